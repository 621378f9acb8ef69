"""W4A8 problems with random, really quantized data, and their exact results."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "EXCESS_TOLERANCE",
    "QUICK_SHAPES",
    "QUICK_TOKENS",
    "SCALE_MAX_MULTIPLE",
    "SHAPES",
    "TOKENS",
    "ZERO_POINT",
    "Shape",
    "Weight",
    "excess_error",
    "pack_int4",
    "quantize_per_token",
    "random_activations",
    "random_weight",
    "reference",
]

ZERO_POINT = 128
SCALE_MAX_MULTIPLE = 15
# Largest acceptable `excess_error`: float32 sums of up to 28672 products, ten times over.
EXCESS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """One linear layer, K input channels to N output channels."""

    k: int
    n: int

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.k}->{self.n}"

    @property
    def int4_bytes(self) -> int:
        """Bytes of the packed weight without scales."""
        return self.k * self.n // 2


SHAPES = (
    Shape(4096, 4096),
    Shape(4096, 14336),
    Shape(14336, 4096),
    Shape(4096, 6144),
    Shape(8192, 28672),
    Shape(28672, 8192),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_SHAPES = (Shape(4096, 4096), Shape(4096, 14336), Shape(14336, 4096))
QUICK_TOKENS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Weight:
    """A quantized weight as the operator takes it.

    Attributes:
        values: int8 [K, N], integers -8..7.
        scale: [ceil(K / block), N] of the compute type.
        block: Input channels that share a scale.
        scale_max_multiple: 15 if every column's scales are base * i with 1 <= |i| <= 15, else 0.
    """

    values: torch.Tensor
    scale: torch.Tensor
    block: int
    scale_max_multiple: int = 0

    def dequantized(self) -> torch.Tensor:
        """float64 [K, N]."""
        rows = self.values.shape[0]
        return self.values.double() * self.scale.double().repeat_interleave(self.block, dim=0)[:rows]


def random_weight(
    shape: Shape, block: int, dtype: torch.dtype, generator: torch.Generator, *, structured: bool = False
) -> Weight:
    """Round a Gaussian weight to int4 per block of `block` input channels.

    Args:
        shape: The layer.
        block: Channels per scale; the last block may be short.
        dtype: Type of the scales.
        generator: Its device is where the weight is made.
        structured: Give every column scales that are small multiples, of both signs, of one base, exact in `dtype`.
    """
    device = generator.device
    blocks = -(-shape.k // block)
    values = torch.empty(shape.k, shape.n, dtype=torch.int8, device=device)
    scale = torch.empty(blocks, shape.n, dtype=dtype, device=device)
    # Column strips bound the float32 intermediate to a few hundred MB for the largest layers.
    for begin in range(0, shape.n, 4096):
        columns = slice(begin, min(begin + 4096, shape.n))
        width = columns.stop - begin
        weight = torch.randn(blocks * block, width, device=device, generator=generator)
        weight *= shape.k**-0.5
        weight[shape.k :] = 0
        weight = weight.view(blocks, block, width)
        wanted = weight.abs().amax(dim=1) / 7.5
        if structured:
            # Four bits fewer in the base leave room for a factor up to 15 in any of the types.
            base = _round_mantissa(wanted.amax(dim=0) / SCALE_MAX_MULTIPLE, 3)
            wanted = (wanted / base).ceil().clamp(1, SCALE_MAX_MULTIPLE) * base
            # A grid of -8..7 reaches farther on one side: quantizers choose the sign of a scale.
            wanted *= torch.randint(0, 2, wanted.shape, device=device, generator=generator) * 2 - 1
        scale[:, columns] = wanted.to(dtype)
        grid = weight / scale[:, columns].float().unsqueeze(1)
        values[:, columns] = grid.round().clamp(-8, 7).to(torch.int8).view(-1, width)[: shape.k]
    return Weight(values, scale, block, SCALE_MAX_MULTIPLE if structured else 0)


def _round_mantissa(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round up to `bits` mantissa bits after the leading one."""
    mantissa, exponent = torch.frexp(x)
    step = 2.0 ** (bits + 1)
    return torch.ldexp((mantissa * step).ceil() / step, exponent)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 [K, N] (-8..7) as ONNX INT4: uint8 [ceil(K * N / 2)], row-major, low nibble first."""
    flat = values.reshape(-1).to(torch.uint8) & 0xF
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def random_activations(tokens: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[tokens, K] with a few strong channels, as transformers have them."""
    x = torch.randn(tokens, k, device=generator.device, generator=generator)
    strong = torch.randint(0, k, (max(1, k // 512),), device=generator.device, generator=generator)
    x[:, strong] *= 6
    return x.to(dtype)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of fptq.DynamicQuantizePerToken in float32: (uint8 [M, K], scale float32 [M, 1])."""
    x32 = x.float()
    # A tensor as the divisor: torch turns division by a number into multiplication on the GPU.
    scale = x32.abs().amax(dim=-1, keepdim=True) / torch.full((), 127.0, device=x.device)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((x32 / scale).round() + ZERO_POINT).clamp(1, 255).to(torch.uint8), scale


def reference(
    quantized: torch.Tensor, a_scale: torch.Tensor, weight: Weight, zero_point: int = ZERO_POINT
) -> torch.Tensor:
    """Return float64 [M, N] of the quantized problem, Y = a_scale * (A - zero_point) @ (B * b_scale).

    The products of integers and their sums stay below 2^53, so float64 holds the integer part exactly.

    Args:
        quantized: uint8 [M, K].
        a_scale: float32 [M, 1] or a scalar.
        weight: The layer's weight.
        zero_point: Of A.
    """
    centred = quantized.double() - zero_point
    n = weight.values.shape[1]
    out = torch.empty(quantized.shape[0], n, dtype=torch.float64, device=quantized.device)
    for begin in range(0, n, 4096):
        columns = slice(begin, begin + 4096)
        strip = Weight(weight.values[:, columns], weight.scale[:, columns], weight.block)
        out[:, columns] = centred @ strip.dequantized()
    return out * a_scale.double()


def excess_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of `actual` beyond the rounding of its own type, relative to max(|expected|, its row's RMS).

    An exact result that is rounded to bfloat16 is off by up to 2e-3; this counts what comes on top of it.

    Args:
        actual: [M, N] of any float type; NaN counts as infinite.
        expected: float64 [M, N].
    """
    kind = torch.finfo(actual.dtype)
    exponent = torch.frexp(expected).exponent - 1
    binade = torch.ldexp(torch.ones_like(expected), exponent).clamp_min(kind.tiny)
    excess = ((actual.double() - expected).abs() - binade * kind.eps / 2).clamp_min(0)
    rms = expected.pow(2).mean(dim=1, keepdim=True).sqrt()
    error = excess / torch.maximum(expected.abs(), rms).clamp_min(1e-300)
    worst = float(error.max()) if error.numel() else 0.0
    return worst if worst == worst else float("inf")
