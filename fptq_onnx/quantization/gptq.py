"""GPTQ with groups: round a weight row by row and let the rows still to come make up for each error."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fptq_onnx.quantization.int4 import Float32, Grid, QuantizedWeight, grid_limits, group_count, group_scales

__all__ = ["Order", "gptq", "inverse_factor"]

logger = logging.getLogger(__name__)

Order = Literal["natural", "activation"]
FloatArray = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]

_BLOCK_ROWS = 128
_MAX_DAMPING_STEPS = 4


def gptq(
    weight: Float32,
    hessian: FloatArray,
    group_size: int,
    grid: Grid,
    scale_dtype: npt.DTypeLike,
    *,
    damping: float = 0.01,
    order: Order = "natural",
    max_multiple: int = 0,
) -> QuantizedWeight:
    """Quantize a weight so that ||X W - X Q|| is small rather than ||W - Q|| (GPTQ, arXiv 2210.17323).

    Args:
        weight: float32 [K, N].
        hessian: [K, K], X^T X of the layer's inputs up to a factor, symmetric and positive semidefinite.
        group_size: Rows per scale.
        grid: How the scale of a group is found. The searches judge the rows that they are given by what an error in
            each row costs after the later rows have compensated ("weighted_clip") or all alike ("mse_clip").
        scale_dtype: float16, bfloat16 or float32.
        damping: Multiple of the mean diagonal added to the diagonal.
        order: "natural" rounds the rows as they lie and takes each group's scale from the rows as compensated so far.
            "activation" rounds the rows of largest Hessian diagonal first, with the scales of the original weight.
        max_multiple: 0, or the largest multiple of integer-structured scales (then taken from the original weight).

    Returns:
        The quantized weight. Channels that never saw a signal are rounded to nearest.

    Raises:
        ModelError: The weight holds NaN, Inf or values beyond the range of the scale type.
    """
    k, n = weight.shape
    h = np.array(hessian, np.float64)
    permutation = np.arange(k) if order == "natural" else np.argsort(-np.diag(h), kind="stable")
    u = inverse_factor(h[np.ix_(permutation, permutation)], damping)
    importance = np.empty(k)
    importance[permutation] = 1 / np.square(np.diag(u))
    fixed = order == "activation" or max_multiple > 0
    scale = np.empty((group_count(k, group_size), n), np.dtype(scale_dtype))
    if fixed:
        scale = group_scales(weight, group_size, grid, scale_dtype, importance=importance, max_multiple=max_multiple)
    low, high = grid_limits(grid)
    w = weight[permutation]
    q = np.empty((k, n), np.int8)
    u32 = u.astype(np.float32)
    for start in range(0, k, _BLOCK_ROWS):
        stop = min(k, start + _BLOCK_ROWS)
        errors = np.empty((stop - start, n), np.float32)
        for i in range(start, stop):
            row = int(permutation[i])
            g = row // group_size
            if not fixed and row % group_size == 0:
                # a group may reach beyond this block: its rows there still wait for this block's update
                end = min(k, i + group_size)
                group = w[i:end]
                if end > stop:
                    group = group.copy()
                    group[stop - i :] -= u32[start:i, stop:end].T @ errors[: i - start]
                scale[g] = group_scales(group, group_size, grid, scale_dtype, importance=importance[i:end])[0]
            s = scale[g].astype(np.float32)
            code = np.clip(np.rint(w[i] / s), low, high)
            q[row] = code
            errors[i - start] = (w[i] - code * s) / u32[i, i]
            w[i + 1 : stop] -= u32[i, i + 1 : stop, None] * errors[i - start]
        w[stop:] -= u32[start:stop, stop:].T @ errors
    return QuantizedWeight(q, scale, group_size, max_multiple)


def inverse_factor(hessian: Float64, damping: float) -> Float64:
    """Upper triangular U with U^T U = (H + d I)^-1, d = damping * mean diagonal.

    Found without forming the inverse: with J the row reversal, J H J = L L^T gives H = R R^T for the upper triangular
    R = J L J, hence U = R^-1. Damping grows tenfold until the matrix is numerically positive definite.
    """
    k = hessian.shape[0]
    diagonal = np.diag(hessian)
    mean = float(diagonal.mean())
    if not np.isfinite(mean):
        raise ValueError("the Hessian holds NaN or Inf")
    unit = mean if mean > 0 else 1.0
    for step in range(_MAX_DAMPING_STEPS):
        damped = hessian + np.eye(k) * (max(damping, 1e-8) * 10**step * unit)
        try:
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            logger.debug("Hessian of order %d not positive definite with damping %g", k, damping * 10**step)
            continue
        factor: Float64 = np.triu(np.linalg.inv(lower[::-1, ::-1]))
        return factor
    raise ValueError(f"the Hessian is not positive semidefinite (smallest diagonal {float(diagonal.min()):.3g})")
