"""cuBLASLt's int8 product with a workspace and a search over its heuristics, which torch._int_mm does not do."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

__all__ = ["Int8Product"]

WORKSPACE_BYTES = 64 << 20
CANDIDATES = 16
# Values of cublasLt.h and library_types.h.
COMPUTE_32I, R_32I, R_8I = 72, 10, 3
DESC_TRANSA, OP_T, PREF_MAX_WORKSPACE_BYTES = 3, 1, 1


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def _loaded_library() -> ctypes.CDLL:
    """The cuBLASLt that torch has loaded already."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.split()[-1]
        if "libcublasLt.so" in path:
            return ctypes.CDLL(path)
    raise RuntimeError("torch has not loaded cuBLASLt")


class Int8Product:
    """out int32 [M, N] = x int8 [M, K] @ weight int8 [N, K].T at one shape; `tune` chooses among the candidates."""

    def __init__(self, m: int, n: int, k: int, device: torch.device) -> None:
        """Ask cuBLASLt for its candidates.

        Raises:
            RuntimeError: It has none for this shape.
        """
        self._library = _loaded_library()
        self._handle = ctypes.c_void_p()
        self._call("Create", ctypes.byref(self._handle))
        self._description = self._made("MatmulDescCreate", COMPUTE_32I, R_32I)
        transposed = ctypes.c_int(OP_T)
        self._call(
            "MatmulDescSetAttribute", self._description, DESC_TRANSA, ctypes.byref(transposed), ctypes.c_size_t(4)
        )
        # Column-major views: weight [N, K] is K x N (transposed), x [M, K] is K x M, out [M, N] is N x M.
        self._weight, self._x = self._layout(R_8I, k, n), self._layout(R_8I, k, m)
        self._out = self._layout(R_32I, n, m)
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        preference = self._made("MatmulPreferenceCreate")
        size = ctypes.c_size_t(WORKSPACE_BYTES)
        self._call(
            "MatmulPreferenceSetAttribute",
            preference,
            PREF_MAX_WORKSPACE_BYTES,
            ctypes.byref(size),
            ctypes.c_size_t(8),
        )
        found, results = ctypes.c_int(), (_Heuristic * CANDIDATES)()
        layouts = (self._weight, self._x, self._out, self._out)
        self._call(
            "MatmulAlgoGetHeuristic",
            self._handle,
            self._description,
            *layouts,
            preference,
            CANDIDATES,
            results,
            ctypes.byref(found),
        )
        self._candidates = [result for result in results[: found.value] if result.state == 0]
        if not self._candidates:
            raise RuntimeError(f"cuBLASLt has no int8 algorithm for M={m}")
        self._chosen = self._candidates[0]

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, f"cublasLt{name}")(*arguments)
        if status:
            raise RuntimeError(f"cublasLt{name} failed with status {status}")

    def _made(self, function: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made

    def _layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        return self._made(
            "MatrixLayoutCreate", dtype, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        )

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply on torch's current stream."""
        one, zero = ctypes.c_int32(1), ctypes.c_int32(0)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, out)]
        self._call(
            "Matmul",
            self._handle,
            self._description,
            ctypes.byref(one),
            pointers[0],
            self._weight,
            pointers[1],
            self._x,
            ctypes.byref(zero),
            pointers[2],
            self._out,
            pointers[2],
            self._out,
            ctypes.byref(self._chosen.algorithm),
            ctypes.c_void_p(self._workspace.data_ptr()),
            ctypes.c_size_t(self._chosen.workspace),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def tune(self, x: torch.Tensor, weights: list[torch.Tensor], out: torch.Tensor) -> None:
        """Keep the candidate that is fastest over these weights."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        times = []
        for candidate in self._candidates:
            self._chosen = candidate
            self(x, weights[0], out)
            begin.record()
            for weight in weights:
                self(x, weight, out)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        self._chosen = self._candidates[times.index(min(times))]
