"""The CUDA kernels through their C interface (custom_ops/src/cuda/kernels_c_api.h), without onnxruntime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpu_bench.problem import Weight, pack_int4

__all__ = ["KernelError", "KernelLibrary", "PackedWeight", "Plan"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class KernelError(RuntimeError):
    """A call of the kernel library failed; the message is the library's own."""


@dataclass(frozen=True)
class Plan:
    """How one product runs; 0 lets the library choose. See FptqMatMulOptions."""

    kernel: int = 0
    loader: int = 0
    tile_m: int = 0
    tile_n: int = 0
    split_k: int = 0
    stages: int = 0
    overlap: int = 0
    form: int = 0

    def __str__(self) -> str:
        """One line for a table."""
        kernel = ("chosen", "streaming", "warpgroup", "reference")[self.kernel]
        form = ("", " wide", " paired", " tall", " broad")[self.form]
        tile = f"{self.tile_m}x{self.tile_n}{form}"
        return f"{kernel} {tile} split {self.split_k} stages {self.stages} loader {self.loader}"


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in asdict(Plan())]


class PackedWeight:
    """A weight in the kernels' layout, in device memory until it is closed or collected."""

    def __init__(self, library: KernelLibrary, handle: int, weight: Weight) -> None:
        """Take over the handle."""
        self._library, self.handle = library, handle
        self.k, self.n = weight.values.shape
        self.dtype = weight.scale.dtype

    @property
    def device_bytes(self) -> int:
        """Device memory the weight holds."""
        return int(self._library.functions.fptq_weights_bytes(self.handle))

    @property
    def integer_scales(self) -> bool:
        """Whether the library verified base * i scales and keeps one int32 sum over all of K."""
        return bool(self._library.functions.fptq_weights_integer_scales(self.handle))

    def close(self) -> None:
        """Free the device memory."""
        if self.handle:
            self._library.functions.fptq_free_weights(self.handle)
            self.handle = 0

    def __del__(self) -> None:
        """See close."""
        self.close()


class KernelLibrary:
    """Typed calls; every tensor argument is a contiguous CUDA tensor, every call goes to torch's current stream."""

    def __init__(self, path: Path) -> None:
        """Load the shared library.

        Raises:
            OSError: It cannot be loaded.
        """
        functions = ctypes.CDLL(str(path))
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        options = ctypes.POINTER(_Options)
        signatures: dict[str, tuple[Sequence[object], object]] = {
            "fptq_last_error": ([], ctypes.c_char_p),
            "fptq_pack_weights": (
                [pointer, pointer, i32, i64, i64, i64, i32, pointer, ctypes.POINTER(pointer)],
                ctypes.c_int,
            ),
            "fptq_free_weights": ([pointer], None),
            "fptq_weights_bytes": ([pointer], i64),
            "fptq_weights_integer_scales": ([pointer], i32),
            "fptq_w4a8_matmul": (
                [pointer, pointer, pointer, i32, pointer, i64, pointer, options, pointer],
                ctypes.c_int,
            ),
            "fptq_dynamic_w4a8_matmul": (
                [pointer, pointer, i64, pointer, pointer, pointer, options, pointer],
                ctypes.c_int,
            ),
            "fptq_quantizes_inside": ([pointer, pointer, i64, ctypes.POINTER(i32)], ctypes.c_int),
            "fptq_describe_plan": ([pointer, i64, options], ctypes.c_int),
            "fptq_dynamic_quantize_per_token": ([pointer, i32, i64, i64, pointer, pointer, pointer], ctypes.c_int),
            "fptq_quantize_static": ([pointer, i32, i64, pointer, pointer, pointer, pointer], ctypes.c_int),
            "fptq_bench_read": ([pointer, i64, pointer, pointer], ctypes.c_int),
            "fptq_bench_wgmma": ([i32, pointer, pointer], ctypes.c_int),
        }
        for name, (arguments, result) in signatures.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, result
        self.functions = functions

    def _check(self, status: int) -> None:
        if status:
            raise KernelError(self.functions.fptq_last_error().decode())

    def pack(self, weight: Weight) -> PackedWeight:
        """Pack a weight whose tensors lie on the CPU or the GPU."""
        handle = ctypes.c_void_p()
        packed, scale = pack_int4(weight.values), weight.scale.contiguous()
        k, n = weight.values.shape
        self._check(
            self.functions.fptq_pack_weights(
                packed.data_ptr(),
                scale.data_ptr(),
                DTYPES[scale.dtype],
                k,
                n,
                weight.block,
                weight.scale_max_multiple,
                _stream(),
                ctypes.byref(handle),
            )
        )
        return PackedWeight(self, int(handle.value or 0), weight)

    def matmul(
        self,
        weight: PackedWeight,
        quantized: torch.Tensor,
        a_scale: torch.Tensor,
        zero_point: torch.Tensor,
        out: torch.Tensor,
        plan: Plan | None = None,
    ) -> None:
        """Multiply into out [M, N]: uint8 [M, K], a_scale float32 [1] or [M, 1], zero_point uint8 [1]."""
        options = ctypes.byref(_Options(**asdict(plan))) if plan else None
        per_token = int(a_scale.dim() == 2)
        self._check(
            self.functions.fptq_w4a8_matmul(
                weight.handle,
                quantized.data_ptr(),
                a_scale.data_ptr(),
                per_token,
                zero_point.data_ptr(),
                quantized.shape[0],
                out.data_ptr(),
                options,
                _stream(),
            )
        )

    def dynamic_matmul(
        self,
        weight: PackedWeight,
        x: torch.Tensor,
        out: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Multiply x [M, K], quantized per token on the way, into out [M, N].

        Args:
            weight: Its scales have the type of x and out.
            x: Float activations.
            out: Results.
            workspace: Quantized uint8 [M, K] and scale float32 [M, 1], where `quantizes_inside` is false.
            plan: How the product runs.
        """
        quantized, scale = (tensor.data_ptr() for tensor in workspace) if workspace else (None, None)
        options = ctypes.byref(_Options(**asdict(plan))) if plan else None
        self._check(
            self.functions.fptq_dynamic_w4a8_matmul(
                weight.handle, x.data_ptr(), x.shape[0], out.data_ptr(), quantized, scale, options, _stream()
            )
        )

    def quantizes_inside(self, weight: PackedWeight, x: torch.Tensor) -> bool:
        """Whether dynamic_matmul is one kernel, which needs no workspace."""
        inside = ctypes.c_int32()
        self._check(self.functions.fptq_quantizes_inside(weight.handle, x.data_ptr(), x.shape[0], ctypes.byref(inside)))
        return bool(inside.value)

    def plan(self, weight: PackedWeight, tokens: int) -> Plan:
        """What the library chooses for this many rows on the current device."""
        chosen = _Options()
        self._check(self.functions.fptq_describe_plan(weight.handle, tokens, ctypes.byref(chosen)))
        return Plan(**{name: getattr(chosen, name) for name, _ in _Options._fields_})

    def quantize_per_token(self, x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> None:
        """X [M, K] to uint8 [M, K] and float32 [M, 1]."""
        self._check(
            self.functions.fptq_dynamic_quantize_per_token(
                x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1], quantized.data_ptr(), scale.data_ptr(), _stream()
            )
        )

    def quantize_static(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quantized: torch.Tensor
    ) -> None:
        """X to uint8 of the same shape, with a float32 [1] scale and a uint8 [1] zero point in device memory."""
        self._check(
            self.functions.fptq_quantize_static(
                x.data_ptr(),
                DTYPES[x.dtype],
                x.numel(),
                scale.data_ptr(),
                zero_point.data_ptr(),
                quantized.data_ptr(),
                _stream(),
            )
        )

    def read(self, data: torch.Tensor, sink: torch.Tensor) -> None:
        """Read `data` once and do nothing else; its bytes must be a multiple of 16."""
        self._check(
            self.functions.fptq_bench_read(
                data.data_ptr(), data.numel() * data.element_size(), sink.data_ptr(), _stream()
            )
        )

    def wgmma(self, iterations: int, sink: torch.Tensor) -> None:
        """Tensor-core instructions only, see the header for their number."""
        self._check(self.functions.fptq_bench_wgmma(iterations, sink.data_ptr(), _stream()))


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
