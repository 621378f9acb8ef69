"""Fine-grained symmetric int4 weights: grids, clip searches and integer-structured scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import ModelError
from fptq_onnx.quantization.float_types import FloatType, float_type

__all__ = [
    "MAX_MULTIPLE",
    "Grid",
    "QuantizedWeight",
    "dequantize",
    "grid_limits",
    "group_count",
    "group_scales",
    "quantize_weight",
    "round_to_scales",
]

Grid = Literal["absmax7", "signed8", "mse_clip", "weighted_clip"]
FloatArray = npt.NDArray[np.floating[Any]]
Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

MAX_MULTIPLE = 15
"""Largest integer multiple of integer-structured scales: 8 * 15 = 120 still fits int8."""

# Candidate scales of the clip searches as multiples of absmax/8, both signs each. 32/28 is absmax/7 and 28/28 is the
# signed grid, so that neither search can be worse (in its own measure) than the plain grids.
_CLIP_RATIOS = np.arange(32, 16, -1, dtype=np.float32) / np.float32(28)
# Multiples that the largest scale of a column may take; fewer would leave small groups too coarse.
_TOP_MULTIPLES = (15, 14, 13, 12)
_BLOCK_ELEMENTS = 1 << 21


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """An int4 weight with one scale per group of consecutive rows.

    Attributes:
        q: int8 [K, N], integers -8..7 (-7..7 on the grid "absmax7").
        scale: T [ceil(K / block_size), N]; entries are finite, non-zero and may be negative.
        block_size: Rows per group; the last group may be shorter.
        scale_max_multiple: 15 when every column's scales are base[n] * i with integer 1 <= |i| <= 15 and every such
            product exact in T; 0 when the scales are free.
    """

    q: Int8
    scale: npt.NDArray[Any]
    block_size: int
    scale_max_multiple: int = 0

    def dequantize(self) -> Float32:
        """The represented weight, float32 [K, N]."""
        return dequantize(self.q, self.scale, self.block_size)


def group_count(k: int, block_size: int) -> int:
    """Number of groups that cover ``k`` rows, the last possibly short."""
    return -(-k // block_size)


def grid_limits(grid: Grid) -> tuple[int, int]:
    """Smallest and largest integer of a grid: (-7, 7) for "absmax7", (-8, 7) for the others."""
    return (-7, 7) if grid == "absmax7" else (-8, 7)


def dequantize(q: Int8, scale: npt.NDArray[Any], block_size: int) -> Float32:
    """Return q * scale as float32 [K, N] for q int8 [K, N] and scale [ceil(K / block_size), N]."""
    rows: Float32 = np.repeat(scale.astype(np.float32), block_size, axis=0)[: q.shape[0]]
    rows *= q
    return rows


def round_to_scales(weight: Float32, scale: npt.NDArray[Any], block_size: int, grid: Grid = "signed8") -> Int8:
    """Nearest integers of ``grid`` for given scales.

    Args:
        weight: float32 [K, N].
        scale: [ceil(K / block_size), N], non-zero.
        block_size: Rows per group.
        grid: Decides the limits, see `grid_limits`.

    Returns:
        int8 [K, N]; ties go to the even integer.
    """
    low, high = grid_limits(grid)
    q = np.empty(weight.shape, np.int8)
    for g in range(scale.shape[0]):
        rows = slice(g * block_size, (g + 1) * block_size)
        q[rows] = np.clip(np.rint(weight[rows] / scale[g].astype(np.float32)), low, high)
    return q


def group_scales(
    weight: Float32,
    group_size: int,
    grid: Grid,
    scale_dtype: npt.DTypeLike,
    *,
    importance: FloatArray | None = None,
    max_multiple: int = 0,
) -> npt.NDArray[Any]:
    """Scales of every group, already rounded to the type in which the model stores them.

    "absmax7" takes absmax/7 (the publication's symmetric grid). "signed8" maps the value of largest magnitude to -8, so
    that the scale has the opposite sign of that value and all 16 codes are used (llama.cpp's Q4_0 rule). "mse_clip" and
    "weighted_clip" pick, among both signs and 16 clip ratios, the scale of least squared error, the latter weighing row
    k by ``importance[k]`` (the mean square of the layer's k-th input, the diagonal of X^T X).

    Args:
        weight: float32 [K, N], finite.
        group_size: Rows per group.
        grid: One of the grids above.
        scale_dtype: float16, bfloat16 (ml_dtypes) or float32.
        importance: [K], >= 0; needed by "weighted_clip", ignored by the grids without a search unless ``max_multiple``
            is set.
        max_multiple: 0, or the largest |i| of integer-structured scales base[n] * i.

    Returns:
        T [ceil(K / group_size), N], finite and non-zero (1 for an all-zero group of free scales).

    Raises:
        ModelError: The weight holds NaN, Inf or values beyond the range of T.
    """
    stored = float_type(scale_dtype)
    if grid == "weighted_clip" and importance is None:
        raise ValueError("grid 'weighted_clip' needs the importance of the input channels")
    k, n = weight.shape
    scale = np.empty((group_count(k, group_size), n), stored.dtype)
    rows = None
    if importance is not None and (grid == "weighted_clip" or max_multiple):
        rows = _grouped(np.asarray(importance, np.float32)[:, None], group_size)
    for columns in _column_blocks(k, n):
        block = weight[:, columns]
        _check_range(block, stored)
        scale[:, columns] = _block_scales(_grouped(block, group_size), grid, stored, rows, max_multiple)
    return scale


def quantize_weight(
    weight: Float32,
    group_size: int,
    grid: Grid,
    scale_dtype: npt.DTypeLike,
    *,
    importance: FloatArray | None = None,
    max_multiple: int = 0,
) -> QuantizedWeight:
    """Round a weight to the nearest int4 values, scales first (see `group_scales` for arguments and errors)."""
    scale = group_scales(weight, group_size, grid, scale_dtype, importance=importance, max_multiple=max_multiple)
    return QuantizedWeight(round_to_scales(weight, scale, group_size, grid), scale, group_size, max_multiple)


def _column_blocks(k: int, n: int) -> Iterator[slice]:
    width = max(16, _BLOCK_ELEMENTS // max(k, 1))
    for start in range(0, n, width):
        yield slice(start, min(n, start + width))


def _grouped(block: FloatArray, group_size: int) -> Float32:
    """Reshape [K, n] to [groups, group_size, n], zero rows appended (they never change a maximum or an error)."""
    k, n = block.shape
    groups = group_count(k, group_size)
    if groups * group_size == k:
        return np.ascontiguousarray(block, np.float32).reshape(groups, group_size, n)
    padded = np.zeros((groups * group_size, n), np.float32)
    padded[:k] = block
    return padded.reshape(groups, group_size, n)


def _check_range(block: Float32, stored: FloatType) -> None:
    largest = float(np.max(np.abs(block), initial=0.0))
    if not np.isfinite(largest):
        raise ModelError("weight", "it holds NaN or Inf", "Repair or re-export the model")
    if largest > stored.largest:
        reason = f"its largest magnitude {largest:.4g} does not fit {stored.dtype}"
        raise ModelError("weight", reason, "Convert a float32 model instead")


def _block_scales(
    w: Float32, grid: Grid, stored: FloatType, rows: Float32 | None, max_multiple: int
) -> npt.NDArray[Any]:
    low, high = grid_limits(grid)
    absmax = np.abs(w).max(axis=1)
    if grid == "absmax7":
        signed = absmax / np.float32(7)
    else:
        # where the largest magnitude is reached by both signs, either choice clips one of them: take the negative scale
        negative = w.max(axis=1) >= absmax
        signed = np.where(negative, -absmax, absmax) / np.float32(8)
    if grid in ("mse_clip", "weighted_clip"):
        signed = _search(w, absmax / np.float32(8), stored, rows if grid == "weighted_clip" else None)
    if max_multiple:
        return _structured(w, signed, stored, rows, max_multiple, (low, high))
    return _round_magnitude(signed, stored, -low)


def _round_magnitude(signed: Float32, stored: FloatType, q_max: int) -> npt.NDArray[Any]:
    """Round to T, keeping |scale| * q_max finite and scale non-zero; 0 becomes 1."""
    magnitude = np.abs(signed)
    if stored.smallest_scale < stored.smallest_normal:
        # Subnormal scales have few bits: rounding them up costs precision of the group, rounding down would clip it.
        step = np.float32(stored.smallest_scale)
        magnitude = np.where(
            magnitude < np.float32(stored.smallest_normal), np.ceil(magnitude / step) * step, magnitude
        )
    limit = _truncate(stored.largest / q_max, stored.bits)
    magnitude = np.clip(magnitude, np.float32(stored.smallest_scale), limit)
    rounded = np.copysign(magnitude, signed).astype(stored.dtype)
    return np.where(signed == 0, stored.dtype.type(1), rounded)


def _truncate(value: float, bits: int) -> np.float32:
    mantissa, exponent = np.frexp(value)
    return np.float32(np.ldexp(np.floor(np.ldexp(mantissa, bits)), exponent - bits))


def _error(w: Float32, scale: Float32, rows: Float32 | None, limits: tuple[int, int]) -> Float32:
    """Squared error of each group, [groups, n]; rows weighed by [groups, group_size, 1]."""
    s = scale[:, None, :]
    difference = np.rint(w / s)
    np.clip(difference, *limits, out=difference)
    difference *= s
    difference -= w
    with np.errstate(over="ignore"):  # of weights beyond 1e19 every error is infinite
        np.square(difference, out=difference)
        if rows is not None:
            difference *= rows
        total: Float32 = difference.sum(axis=1)
    return total


def _search(w: Float32, unit: Float32, stored: FloatType, rows: Float32 | None) -> Float32:
    """Signed scale of least error in every group; the candidates are rounded to T before they are judged."""
    best = _round_magnitude(-unit, stored, 8).astype(np.float32)  # where all errors are infinite
    least = np.full(unit.shape, np.inf, np.float32)
    for sign in (np.float32(-1), np.float32(1)):
        for ratio in _CLIP_RATIOS:
            candidate = _round_magnitude(sign * ratio * unit, stored, 8).astype(np.float32)
            error = _error(w, candidate, rows, (-8, 7))
            better = error < least
            np.copyto(least, error, where=better)
            np.copyto(best, candidate, where=better)
    return np.where(unit == 0, np.float32(0), best)


def _structured(
    w: Float32,
    signed: Float32,
    stored: FloatType,
    rows: Float32 | None,
    max_multiple: int,
    limits: tuple[int, int],
) -> npt.NDArray[Any]:
    """Replace free scales [groups, n] by base[n] * i, choosing base and i by the error of the column."""
    magnitude = np.abs(signed)
    top = magnitude.max(axis=0)
    limit = np.float32(stored.largest / -limits[0])
    sign = np.where(signed < 0, np.float32(-1), np.float32(1))
    best = np.zeros_like(signed)
    least = np.full(top.shape, np.inf, np.float32)
    for multiple in _TOP_MULTIPLES if max_multiple == MAX_MULTIPLE else (max_multiple,):
        base = _exact_base(top / np.float32(multiple), stored, max_multiple.bit_length())
        with np.errstate(over="ignore"):
            ceiling = np.minimum(np.float32(max_multiple), np.floor(limit / base))
        down = np.clip(np.floor(magnitude / base), 1, ceiling)
        up = np.clip(np.ceil(magnitude / base), 1, ceiling)
        error_down = _error(w, sign * down * base, rows, limits)
        error_up = _error(w, sign * up * base, rows, limits)
        with np.errstate(over="ignore"):
            error = np.minimum(error_down, error_up).sum(axis=0)
        better = (error < least) | ~best.any(axis=0)  # the first one also where all errors are infinite
        np.copyto(least, error, where=better)
        np.copyto(best, sign * base * np.where(error_up <= error_down, up, down), where=better)
    return best.astype(stored.dtype)


def _exact_base(base: Float32, stored: FloatType, multiple_bits: int) -> Float32:
    """Round [n] bases so that base * i is exact in T for every i of ``multiple_bits`` bits; 0 becomes 1."""
    smallest = np.float32(stored.smallest_scale)
    mantissa, exponent = np.frexp(np.maximum(base, smallest))
    bits = stored.bits - multiple_bits
    rounded: Float32 = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    if stored.smallest_scale < stored.smallest_normal:
        # below the normal range T is a fixed-point format: a multiple of its step stays one when multiplied
        fixed_point = np.ldexp(np.float32(1), exponent - bits) < smallest
        rounded = np.where(fixed_point, np.ceil(rounded / smallest) * smallest, rounded)
    return np.where(base == 0, np.float32(1), rounded)
