"""Per-channel scales and shifts that move the spread of an activation into the weights and biases that read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "channel_shift",
    "equalized_absmax",
    "lae_scale",
    "round_mantissa",
    "scale_rows",
    "shift_output",
    "smooth",
    "smoothquant_scale",
    "tie",
]

FloatArray = npt.NDArray[np.floating[Any]]
Float32 = npt.NDArray[np.float32]


def lae_scale(channel_absmax: FloatArray, floor: float = 1e-2) -> Float32:
    """Logarithmic activation equalization: s_j = m_j / log2(2 + m_j) with m_j = max |X_j| (FPTQ).

    X / s has the range log2(2 + m), so a channel of range 150 shrinks to 7.2.

    Args:
        channel_absmax: [K], >= 0.
        floor: Smallest s as a fraction of the median s of the live channels. Without it a channel that was nearly
            silent in calibration is amplified without bound.

    Returns:
        float32 [K], > 0; 1 where the channel's maximum is 0.
    """
    m = np.asarray(channel_absmax, np.float64)
    return _finish(m / np.log2(2 + m), m == 0, floor)


def smoothquant_scale(
    channel_absmax: FloatArray, weight_absmax: FloatArray, alpha: float, floor: float = 1e-2
) -> Float32:
    """SmoothQuant: s_j = max |X_j|^alpha / max |W_j|^(1 - alpha) (arXiv 2211.10438).

    Args:
        channel_absmax: [K], >= 0.
        weight_absmax: [K], max over all columns of all layers that read the activation.
        alpha: 0 leaves the weights equal, 1 leaves the activations equal.
        floor: As in `lae_scale`.

    Returns:
        float32 [K], > 0; 1 where the channel or its weights are all zero.
    """
    m = np.asarray(channel_absmax, np.float64)
    w = np.asarray(weight_absmax, np.float64)
    dead = (m == 0) | (w == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = m**alpha / w ** (1 - alpha)
    return _finish(s, dead, floor)


def _finish(s: npt.NDArray[np.float64], dead: npt.NDArray[np.bool_], floor: float) -> Float32:
    live = s[~dead]
    if live.size == 0:
        return np.ones(s.shape, np.float32)
    smallest = max(floor * float(np.median(live)), float(np.finfo(np.float32).tiny))
    return np.where(dead, 1.0, np.maximum(s, smallest)).astype(np.float32)


def round_mantissa(scale: FloatArray, bits: int) -> Float32:
    """Round scales, > 0, to ``bits`` significant bits.

    Statistics that differ in their last bits, as those of two exports of one model do, then give the same scales, and
    with them the same int4 weights.
    """
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    rounded: Float32 = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)
    return rounded


def tie(scale: FloatArray, channel_map: npt.NDArray[np.integer[Any]]) -> Float32:
    """Make scales equal on all channels that one producer channel feeds, by their maximum.

    Grouped-query attention repeats one value head for several query heads, so the o_proj channels that come from one
    v_proj channel must share one s. The maximum is the s of the widest of them: none leaves its intended range.

    Args:
        scale: [K], > 0.
        channel_map: int [K], the producer's output channel behind each activation channel.

    Returns:
        float32 [K].
    """
    widest = np.zeros(int(channel_map.max()) + 1, np.float32)
    np.maximum.at(widest, channel_map, np.asarray(scale, np.float32))
    tied: Float32 = widest[channel_map]
    return tied


def scale_rows(weight: Float32, scale: Float32) -> Float32:
    """Return diag(s) W for a weight [K, N], so that (X / s) (diag(s) W) = X W."""
    rows: Float32 = weight * scale[:, None]
    return rows


def equalized_absmax(channel_absmax: FloatArray, scale: FloatArray) -> Float32:
    """Per-channel maximum of X / s, float32 [K]."""
    after: Float32 = np.divide(channel_absmax, scale, dtype=np.float32)
    return after


def channel_shift(
    channel_min: FloatArray, channel_max: FloatArray, channel_map: npt.NDArray[np.integer[Any]], bits: int = 0
) -> Float32:
    """Middle of each channel's range: z_j = (max X_j + min X_j) / 2 (Outlier Suppression+, arXiv 2304.09145).

    X - z needs half the width of the widest channel for its range, wherever that channel lies. A zero point moves all
    channels alike, and helps only where they lie on the same side.

    Args:
        channel_min: [K].
        channel_max: [K], >= channel_min.
        channel_map: int [K], the producer's output channel behind each activation channel. Channels of one producer
            channel get the middle of all their ranges together.
        bits: Round z to this many bits of half the width, so that statistics that differ in their last bits give the
            same z; 0 for all.

    Returns:
        float32 [K]; 0 for a channel without finite extremes.
    """
    count = int(channel_map.max(initial=-1)) + 1
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, channel_map, np.asarray(channel_min, np.float64))
    np.maximum.at(high, channel_map, np.asarray(channel_max, np.float64))
    known = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(known, low, 0), np.where(known, high, 0)
    middle = (low + high) / 2
    if bits:
        # half the width is 0 for a channel that never moves: then z itself gives the grid
        _, exponent = np.frexp(np.where(high > low, (high - low) / 2, np.abs(middle)))
        middle = np.ldexp(np.rint(np.ldexp(middle, bits - exponent)), exponent - bits)
    shift: Float32 = middle.astype(np.float32)[channel_map]
    return shift


def shift_output(shift: FloatArray, weight: FloatArray) -> Float32:
    """What the bias of a layer gains when its input loses z: z W, float32 [N], for z [K] and W [K, N].

    W is the full-precision weight. With the quantized one Q the error of the output would be X (W - Q), as without the
    shift; with W it is (X - z) (W - Q), and X - z is the smaller where a channel lies off zero.
    """
    gained: Float32 = (np.asarray(shift, np.float64) @ np.asarray(weight, np.float64)).astype(np.float32)
    return gained


def smooth(x: FloatArray, scale: FloatArray | None, shift: FloatArray | None) -> FloatArray:
    """(X - z) / s for X [..., K]; None for no shift or no scale."""
    centred = x if shift is None else x - shift
    return centred if scale is None else centred / scale
