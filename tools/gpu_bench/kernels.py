"""Mode "kernels": the CUDA kernels themselves on cold weights, against every other way to multiply, and checked."""

from __future__ import annotations

import argparse
import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_bench.kernel_library import KernelLibrary, PackedWeight
from gpu_bench.peers import PEERS, Call, Copy, Peer, PeerUnavailableError, cold_copies, copy
from gpu_bench.problem import (
    EXCESS_TOLERANCE,
    QUICK_SHAPES,
    QUICK_TOKENS,
    SHAPES,
    TOKENS,
    ZERO_POINT,
    Shape,
    Weight,
    excess_error,
    quantize_per_token,
    random_activations,
    random_weight,
    reference,
)
from gpu_bench.records import environment, write_record
from gpu_bench.tables import markdown_table
from gpu_bench.timing import ROUNDS, CapturedCalls, interleave

__all__ = ["add_arguments", "check_kernels", "run"]

logger = logging.getLogger(__name__)

DTYPE = torch.float16
BLOCK = 128
SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 256
QUICK_PEERS = ("torch fp16", "torch int8", "humming", "pure read", "copy")
# Wgmma rates are read off a run of about a millisecond.
WGMMA_ITERATIONS, WGMMA_OPERATIONS = 2000, 2 * 8 * 2 * 64 * 128 * 32


def workspace(tokens: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized activations, uint8 [tokens, k], and their scales, float32 [tokens, 1]."""
    return torch.empty(tokens, k, dtype=torch.uint8, device=device), torch.empty(tokens, 1, device=device)


class Ours(Peer):
    """The project's kernels: quantize each token, multiply with float group scales."""

    contains = "activation quantization and product"
    structured = False
    quantizes = True
    checked = True

    def __init__(self, shape: Shape, generator: torch.Generator, library: KernelLibrary) -> None:
        """Quantize and pack the weights; the first one is kept to check against."""
        super().__init__(shape, generator)
        self.library = library
        self.packed: list[PackedWeight] = []
        self.first: Weight | None = None
        for _ in range(cold_copies(shape.int4_bytes)):
            weight = random_weight(shape, BLOCK, DTYPE, generator, structured=self.structured)
            self.first = self.first or weight
            self.packed.append(library.pack(weight))
        if self.packed[0].integer_scales != self.structured:
            raise RuntimeError(f"{shape.label}: the library took the scales for structured={not self.structured}")

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        device = self.generator.device
        x = random_activations(tokens, self.shape.k, DTYPE, self.generator)
        quantized, scale = workspace(tokens, self.shape.k, device)
        zero_point = torch.full((1,), ZERO_POINT, dtype=torch.uint8, device=device)
        y = torch.empty(tokens, self.shape.n, dtype=DTYPE, device=device)
        self.library.quantize_per_token(x, quantized, scale)

        def call(weight: PackedWeight) -> None:
            if self.quantizes:
                self.library.quantize_per_token(x, quantized, scale)
            self.library.matmul(weight, quantized, scale, zero_point, y)

        return [lambda weight=weight: call(weight) for weight in self.packed]


class OursStructured(Ours):
    """The same with scales that are small multiples of one base per column."""

    structured = True


class OursFused(Ours):
    """Float activations: up to eight tokens are quantized by the kernel that multiplies them."""

    contains = "activation quantization and product, one op"
    checked = False  # with the two kernels that it stands for

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        x = random_activations(tokens, self.shape.k, DTYPE, self.generator)
        y = torch.empty(tokens, self.shape.n, dtype=DTYPE, device=x.device)
        space = workspace(tokens, self.shape.k, x.device)
        return [lambda weight=weight: self.library.dynamic_matmul(weight, x, y, space) for weight in self.packed]


class OursFusedStructured(OursFused):
    """The same with scales that are small multiples of one base per column."""

    structured = True


class OursProduct(Ours):
    """Without the activation quantization, which readers of one activation share."""

    contains = "product only"
    quantizes = checked = False


class PureRead(Peer):
    """A kernel that reads the bytes of the 4-bit weight and does nothing else: the floor of a small batch."""

    contains = "reads K * N / 2 bytes"

    def __init__(self, shape: Shape, generator: torch.Generator, library: KernelLibrary) -> None:
        """Fill the buffers with random bytes."""
        super().__init__(shape, generator)
        self.library = library
        self.copies = Copy(shape, generator)
        self.sink = torch.empty(1, dtype=torch.int32, device=generator.device)

    def calls(self, tokens: int) -> list[Call]:
        """See Peer; the token count has no part in it."""
        return [lambda b=b: self.library.read(b, self.sink) for b in self.copies.buffers]


OURS = {
    "W4A8": Ours,
    "W4A8 fused": OursFused,
    "W4A8 structured": OursStructured,
    "W4A8 structured fused": OursFusedStructured,
    "W4A8 product": OursProduct,
    "pure read": PureRead,
}
FORMS = tuple(name for name, peer in OURS.items() if issubclass(peer, Ours) and peer.quantizes)  # whole operations
NAMES = (*OURS, *PEERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument("--library", type=Path, required=True, help="shared library of the kernels' C interface")
    parser.add_argument("--tokens", type=int, nargs="+", help="token counts M")
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help="layer shapes, e.g. 4096x14336")
    parser.add_argument("--peers", nargs="+", choices=NAMES, metavar="NAME", help=f"any of: {', '.join(NAMES)}")


def run(arguments: argparse.Namespace) -> int:
    """Check, measure, print the tables, write the record; returns the exit status."""
    head = environment()
    shapes = [Shape(*map(int, text.split("x"))) for text in arguments.shapes or ()]
    shapes = shapes or list(QUICK_SHAPES if arguments.quick else SHAPES)
    tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    names = arguments.peers or [n for n in NAMES if not arguments.quick or n in QUICK_PEERS or n.startswith("W4A8")]
    library = KernelLibrary(arguments.library)
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    ceilings = _ceilings(library, generator)
    print(", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()), flush=True)

    rows: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for shape in shapes:
        of_shape = _measure_shape(shape, tokens, names, library, generator, unavailable)
        rows += of_shape
        print(f"\n{shape.label} (microseconds)\n{_table(of_shape, names)}", flush=True)
    for name, reason in unavailable.items():
        print(f"{name}: not measured: {reason}")
    wrong = [
        f"{row['shape']} M={row['tokens']} {name}: {check}"
        for row in rows
        for name, check in row["checks"].items()
        if not check["passed"]
    ]
    for line in wrong:
        print(f"WRONG RESULT: {line}")
    contains = {name: (OURS | PEERS)[name].contains for name in names}
    protocol = {
        "unit": "microseconds per call inside a CUDA graph, median with range",
        "weights": "different ones of at least 240 MB together",
        "rounds": ROUNDS,
        "block": BLOCK,
        "contains": contains,
        "check": f"integer part equal to int64; within {EXCESS_TOLERANCE:.0e} of float64 beyond the output type's "
        "rounding; bytes repeat",
    }
    body = {"protocol": protocol, "ceilings": ceilings, "unavailable": unavailable, "rows": rows}
    print(write_record("gpu-kernels" + ("-quick" if arguments.quick else ""), head, body))
    return 1 if wrong else 0


def _ceilings(library: KernelLibrary, generator: torch.Generator) -> dict[str, float]:
    """What the device can do: reading, copying (read + write) and int8 tensor cores, in TB/s and TOPS."""
    sink = torch.empty(1, dtype=torch.int32, device="cuda")
    big = torch.randint(-128, 127, (1 << 30,), dtype=torch.int8, device="cuda", generator=generator)
    other = torch.empty_like(big)
    multiprocessors = torch.cuda.get_device_properties(big.device).multi_processor_count
    timers = {
        "read TB/s": CapturedCalls([lambda: library.read(big, sink), lambda: library.read(other, sink)]),
        "copy TB/s": CapturedCalls([lambda: copy(big, other)] * 2),
        "wgmma TOPS": CapturedCalls([lambda: library.wgmma(WGMMA_ITERATIONS, sink)] * 2),
    }
    work = {
        "read TB/s": big.numel(),
        "copy TB/s": 2 * big.numel(),
        "wgmma TOPS": multiprocessors * WGMMA_ITERATIONS * WGMMA_OPERATIONS,
    }
    return {name: work[name] / timing.median_us / 1e6 for name, timing in interleave(timers).items()}


def _measure_shape(
    shape: Shape,
    tokens: tuple[int, ...],
    names: list[str],
    library: KernelLibrary,
    generator: torch.Generator,
    unavailable: dict[str, str],
) -> list[dict[str, Any]]:
    peers: dict[str, Peer] = {}
    for name in names:
        try:
            peers[name] = OURS[name](shape, generator, library) if name in OURS else PEERS[name](shape, generator)
        except PeerUnavailableError as error:
            unavailable[f"{name} {shape.label}"] = str(error)
    rows = []
    for m in tokens:
        timers = {}
        for name, peer in peers.items():
            try:
                timers[name] = CapturedCalls(peer.calls(m))
            except (PeerUnavailableError, RuntimeError) as error:
                if name in OURS:
                    raise
                unavailable[f"{name} {shape.label} M={m}"] = str(error).splitlines()[0]
        timings = interleave(timers)
        ours = {name: peer for name, peer in peers.items() if isinstance(peer, Ours)}
        rows.append(
            {
                "shape": shape.label,
                "tokens": m,
                "plans": {name: str(library.plan(peer.packed[0], m)) for name, peer in ours.items()},
                "checks": {name: check_kernels(peer, m) for name, peer in ours.items() if peer.checked},
                "us": {name: timing.as_dict() for name, timing in timings.items()},
            }
        )
        del timers
    del peers
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def check_kernels(ours: Ours, tokens: int) -> dict[str, Any]:
    """Compare the kernels with exact arithmetic at one size.

    Returns:
        "integers" (the sums equal int64's on sampled rows and columns), "error" (see `excess_error`), "quantize"
        (the activations are quantized exactly as defined), "repeats" (equal bytes twice), "fused" (one op gives the
        bytes of two), "passed".
    """
    library, weight, packed, device = ours.library, ours.first, ours.packed[0], ours.generator.device
    if weight is None:
        raise ValueError("no weight was kept to check against")
    x = random_activations(tokens, ours.shape.k, DTYPE, ours.generator)
    quantized = torch.zeros(tokens, ours.shape.k, dtype=torch.uint8, device=device)
    scale = torch.full((tokens, 1), float("nan"), device=device)
    zero_point = torch.full((1,), ZERO_POINT, dtype=torch.uint8, device=device)
    library.quantize_per_token(x, quantized, scale)
    expected_quantized, expected_scale = quantize_per_token(x)
    quantize = bool(torch.equal(quantized, expected_quantized)) and bool(torch.equal(scale, expected_scale))

    def product(b: PackedWeight, a_scale: torch.Tensor) -> torch.Tensor:
        y = torch.full((tokens, ours.shape.n), float("nan"), dtype=b.dtype, device=device)
        library.matmul(b, quantized, a_scale, zero_point, y)
        return y

    y = product(packed, scale)
    repeats = bool(torch.equal(y.view(torch.int16), product(packed, scale).view(torch.int16)))
    one_op = torch.full_like(y, float("nan"))
    library.dynamic_matmul(packed, x, one_op, workspace(tokens, ours.shape.k, device))
    fused = bool(torch.equal(y.view(torch.int16), one_op.view(torch.int16)))
    rows = torch.randperm(tokens, device=device, generator=ours.generator)[:SAMPLED_ROWS]
    error = excess_error(y[rows], reference(quantized[rows], scale[rows], weight))
    finite = bool(torch.isfinite(y).all())

    # With integer scales and a float32 output the result is the integer sum itself: random data stay below 2^24.
    multiples = torch.randint(
        1, max(weight.scale_max_multiple, 1) + 1, weight.scale.shape, device=device, generator=ours.generator
    )
    if weight.scale_max_multiple:
        multiples *= torch.randint(0, 2, multiples.shape, device=device, generator=ours.generator) * 2 - 1
    unit = Weight(weight.values, multiples.float(), weight.block, weight.scale_max_multiple)
    sums = product(library.pack(unit), torch.ones(1, device=device))
    columns = torch.randperm(ours.shape.n, device=device, generator=ours.generator)[:SAMPLED_COLUMNS]
    b = weight.values[:, columns].long() * multiples[:, columns].repeat_interleave(weight.block, dim=0)[: ours.shape.k]
    exact = (quantized[rows].cpu().numpy().astype(np.int64) - ZERO_POINT) @ b.cpu().numpy()
    integers = bool((sums[rows][:, columns].cpu().numpy() == exact).all())
    passed = integers and repeats and finite and quantize and fused and error <= EXCESS_TOLERANCE
    return {
        "passed": passed,
        "integers": integers,
        "error": error,
        "quantize": quantize,
        "repeats": repeats,
        "fused": fused,
    }


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    headers = ["M", *names, "fp16 / W4A8", "humming / W4A8", "TOPS", "TB/s", "error", "plan"]
    cells = []
    for row in rows:
        us = {name: figures["median_us"] for name, figures in row["us"].items()}
        ours = min((us[name] for name in FORMS if name in us), default=None)
        k, n = map(int, row["shape"].split("->"))
        ratios = [f"{us[peer] / ours:.2f}" if peer in us and ours else "-" for peer in ("torch fp16", "humming")]
        rates = ["-", "-"]
        if ours:
            moved = k * n / 2 + row["tokens"] * (k + 2 * n) + 2 * n * k / BLOCK
            rates = [f"{2 * row['tokens'] * k * n / ours / 1e6:.0f}", f"{moved / ours / 1e6:.2f}"]
        errors = [check["error"] for check in row["checks"].values()]
        cells.append(
            [
                str(row["tokens"]),
                *(f"{us[name]:.2f}" if name in us else "-" for name in names),
                *ratios,
                *rates,
                f"{max(errors):.1e}" if errors else "-",
                row["plans"].get("W4A8", "-"),
            ]
        )
    return markdown_table(headers, cells)
