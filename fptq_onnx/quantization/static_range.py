"""Static activation ranges and the scale and zero point that they give."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fptq_onnx.quantization.float_types import float_type
from fptq_onnx.quantization.statistics import histogram_edges

__all__ = ["RangeMethod", "activation_qparams", "mse_bound", "percentile_bound", "static_bounds"]

RangeMethod = Literal["absmax", "percentile", "mse"]
_LEVELS = 127


def percentile_bound(histogram: npt.NDArray[np.int64], percentile: float) -> float:
    """Smallest bin edge that ``percentile`` per cent of all magnitudes stay below; 0 for an empty histogram."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    reached = np.cumsum(histogram) >= total * (percentile / 100)
    return float(histogram_edges(histogram.size)[int(np.argmax(reached)) + 1])


def mse_bound(histogram: npt.NDArray[np.int64], absmax: float) -> float:
    """Clip value c that minimises the expected squared error of symmetric int8 with step c / 127.

    A value inside the range errs by step^2 / 12 (or by its own square where it rounds to 0), a value outside by its
    distance to c. Every bin stands for its midpoint.

    Args:
        histogram: Counts of |x| in the bins of `histogram_edges`.
        absmax: The exact maximum, the largest candidate.

    Returns:
        A bin edge or ``absmax``; 0 for an empty histogram.
    """
    if absmax == 0 or not histogram.any():
        return 0.0
    edges = histogram_edges(histogram.size)
    value = np.minimum((edges[:-1] + edges[1:]) / 2, absmax)
    used = histogram > 0
    value, count = value[used], histogram[used].astype(np.float64)
    inside_edges = edges[1:]
    candidates = np.append(inside_edges[(inside_edges < absmax) & (inside_edges > value[0])], absmax)
    step = candidates[:, None] / _LEVELS
    rounding = np.where(value < step / 2, value**2, step**2 / 12)
    error = np.where(value <= candidates[:, None], rounding, (value - candidates[:, None]) ** 2)
    return float(candidates[int(np.argmin(error @ count))])


def static_bounds(
    low: float,
    high: float,
    histogram: npt.NDArray[np.int64],
    method: RangeMethod = "absmax",
    percentile: float = 99.99,
) -> tuple[float, float]:
    """Choose the clip range of a per-tensor static activation.

    Args:
        low: Smallest value observed.
        high: Largest value observed.
        histogram: Counts of |x|, bins of `histogram_edges`.
        method: "absmax" keeps everything, "percentile" and "mse" clip the magnitude (see the functions above).
        percentile: For "percentile", in per cent.

    Returns:
        (low, high), never wider than the observed values.
    """
    absmax = max(abs(low), abs(high))
    if method == "absmax":
        return low, high
    bound = percentile_bound(histogram, percentile) if method == "percentile" else mse_bound(histogram, absmax)
    return max(low, -bound), min(high, bound)


def activation_qparams(
    low: float, high: float, *, symmetric: bool = True, dtype: npt.DTypeLike = np.float32
) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 for a static range.

    Symmetric: zero point 128 and scale max(|low|, |high|) / 127. Asymmetric: the range is widened to hold 0 and spread
    over 0..255, so that 0 is exact.

    Args:
        low: Lower end of the range, finite.
        high: Upper end of the range, finite, >= low.
        symmetric: See above.
        dtype: Type of the activation. The scale is rounded to it, because QuantizeLinear takes the scale in the
            activation's type and W4A8MatMul takes the same number in float32.

    Returns:
        (scale float32 > 0, zero_point uint8); scale 1 for the empty range 0..0.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"not a range: {low}..{high}")
    if symmetric:
        exact = max(abs(low), abs(high)) / _LEVELS
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        exact = (high - low) / 255
    if exact == 0:
        return np.float32(1), np.uint8(128)
    stored = float_type(dtype)
    # a subnormal scale would be flushed to zero by some kernels and lose most of its bits in all
    scale = np.float32(np.asarray(np.clip(exact, stored.smallest_normal, stored.largest), stored.dtype))
    zero_point = 128 if symmetric else int(np.clip(np.rint(-low / float(scale)), 0, 255))
    return scale, np.uint8(zero_point)
