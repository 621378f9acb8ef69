"""Choose scheme and equalization of an activation by the output error of the quantized layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.quantization.equalize import lae_scale, round_mantissa, scale_rows, smoothquant_scale
from fptq_onnx.quantization.int4 import Float32, Grid, quantize_weight
from fptq_onnx.quantization.policy import EqualizationMethod, Scheme
from fptq_onnx.quantization.static_range import activation_qparams

__all__ = [
    "ALPHAS",
    "Candidate",
    "Search",
    "quantize_per_token",
    "quantize_static",
    "search_range",
    "search_scheme",
    "token_weights",
]

FloatArray = npt.NDArray[np.floating[Any]]

ALPHAS = (0.25, 0.5, 0.75)
"""Exponents of SmoothQuant that the search tries (arXiv 2211.10438 finds 0.4 to 0.6 best on most models)."""

# Equalization has to earn its place: it moves spread into the weights and may need a node of its own.
_NO_WORSE = 1.05


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to quantize an activation and the layers behind it.

    Attributes:
        scheme: STATIC, EQUALIZED_STATIC or PER_TOKEN.
        equalization: The method of the scale.
        alpha: SmoothQuant's exponent, 0 for the other methods.
        scale: float32 [K] that divides the activation, or None.
        error: Squared output error over squared output, summed over the layers.
    """

    scheme: Scheme
    equalization: EqualizationMethod
    alpha: float
    scale: Float32 | None
    error: float


@dataclass(frozen=True, eq=False)
class Search:
    """All candidates of one activation, the chosen one first, and why it was chosen."""

    candidates: tuple[Candidate, ...]
    reason: str

    @property
    def chosen(self) -> Candidate:
        """The candidate to carry out."""
        return self.candidates[0]


def quantize_static(x: FloatArray, low: float, high: float, *, symmetric: bool = True) -> Float32:
    """What per-tensor uint8 keeps of x for the range low..high (see `activation_qparams`), float32."""
    scale, zero_point = activation_qparams(low, high, symmetric=symmetric)
    zero = np.float32(zero_point)
    code = np.clip(np.rint(np.asarray(x, np.float32) / scale) + zero, 0, 255)
    kept: Float32 = (code - zero) * scale
    return kept


def quantize_per_token(x: FloatArray) -> Float32:
    """What per-token symmetric int8 keeps of x [tokens, K], scale absmax / 127 of each row."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    kept: Float32 = np.rint(x / scale) * scale
    return kept


def token_weights(samples: Float32, cap: float) -> npt.NDArray[np.float64]:
    """Weight [tokens] of each token's squared error: 1, or (cap * median / own magnitude)^2 where that is less.

    An attention sink, hundreds of times larger than the other tokens, would otherwise decide a sum of squares alone.

    Args:
        samples: float32 [tokens, K].
        cap: Multiple of the median token's largest magnitude; 0 for equal weights.
    """
    peak = np.abs(samples).max(axis=1, initial=0).astype(np.float64)
    if cap == 0 or not len(peak):
        return np.ones(len(peak))
    weights: npt.NDArray[np.float64] = np.square(np.minimum(1, cap * np.median(peak) / np.maximum(peak, 1e-30)))
    return weights


def search_range(
    samples: Float32,
    weights: Iterable[Float32],
    candidates: Mapping[str, tuple[float, float]],
    *,
    symmetric: bool = True,
    token_cap: float = 16.0,
) -> str:
    """The static range that moves the outputs of the layers behind an activation least, their weights kept float.

    Args:
        samples: float32 [tokens, K], inputs of the layers.
        weights: The layers' weights, float32 [K, N_i], read one after another.
        candidates: (low, high) by name.
        symmetric: Zero point 128.
        token_cap: See `token_weights`.

    Returns:
        The name of the best candidate, the first of equals.
    """
    tokens = token_weights(samples, token_cap)[:, None]
    moved = {
        name: quantize_static(samples, low, high, symmetric=symmetric) - samples
        for name, (low, high) in candidates.items()
    }
    errors = dict.fromkeys(candidates, 0.0)
    for weight in weights:
        for name, difference in moved.items():
            errors[name] += float(np.sum(tokens * np.square(difference @ weight, dtype=np.float64)))
    return min(errors, key=lambda name: errors[name])


def search_scheme(
    samples: Float32,
    weights: Sequence[Float32],
    channel_min: FloatArray,
    channel_max: FloatArray,
    *,
    group_size: int,
    grid: Grid,
    symmetric: bool = True,
    floor: float = 1e-2,
    tolerance: float = 1.25,
    token_cap: float = 16.0,
    scale_bits: int = 0,
) -> Search:
    """Quantize the layers behind one activation in every way and keep the best static one if it is good enough.

    The candidates are plain static, LAE, SmoothQuant with `ALPHAS`, and per token. Weights are rounded to nearest on
    ``grid`` with the samples' mean squares as importance: a later GPTQ lowers all errors alike.

    Args:
        samples: float32 [tokens, K], inputs of the layers, the leading tokens of a sequence among them.
        weights: The layers' weights, float32 [K, N_i] each.
        channel_min: [K] over all of calibration: static ranges cover more than the samples.
        channel_max: [K], likewise.
        group_size: Rows per weight scale.
        grid: Weight grid.
        symmetric: Zero point 128 for static candidates.
        floor: Smallest equalization scale relative to the median.
        tolerance: A static candidate wins if its error is at most this multiple of the per-token error: static scales
            cost nothing at run time.
        token_cap: See `token_weights`.
        scale_bits: Significant bits of equalization scales, 0 for all.

    Returns:
        The candidates, the chosen one first, the rest by error.
    """
    channel_min = np.asarray(channel_min, np.float32)
    channel_max = np.asarray(channel_max, np.float32)
    absmax = np.maximum(np.abs(channel_min), np.abs(channel_max))
    weight_absmax = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
    targets = [samples @ w for w in weights]

    counted = token_weights(samples, token_cap)[:, None]

    def kept(scale: Float32) -> Float32:
        return round_mantissa(scale, scale_bits) if scale_bits else scale

    def error(scale: Float32 | None, per_token: bool) -> float:
        x = samples if scale is None else samples / scale
        low, high = (channel_min, channel_max) if scale is None else (channel_min / scale, channel_max / scale)
        seen = (
            quantize_per_token(x)
            if per_token
            else quantize_static(x, float(low.min()), float(high.max()), symmetric=symmetric)
        )
        importance = np.mean(np.square(seen, dtype=np.float64), axis=0)
        noise = signal = 0.0
        for w, target in zip(weights, targets, strict=True):
            rows = w if scale is None else scale_rows(w, scale)
            q = quantize_weight(rows, group_size, grid, np.float32, importance=importance).dequantize()
            noise += float(np.sum(counted * np.square(seen @ q - target, dtype=np.float64)))
            signal += float(np.sum(counted * np.square(target, dtype=np.float64)))
        return noise / signal if signal > 0 else (0.0 if noise == 0 else float("inf"))

    static = [Candidate(Scheme.STATIC, "none", 0.0, None, error(None, False))]
    scale = kept(lae_scale(absmax, floor))
    static.append(Candidate(Scheme.EQUALIZED_STATIC, "lae", 0.0, scale, error(scale, False)))
    for alpha in ALPHAS:
        scale = kept(smoothquant_scale(absmax, weight_absmax, alpha, floor))
        static.append(Candidate(Scheme.EQUALIZED_STATIC, "smoothquant", alpha, scale, error(scale, False)))
    dynamic = Candidate(Scheme.PER_TOKEN, "none", 0.0, None, error(None, True))
    best = min(static, key=lambda c: c.error)
    if static[0].error <= _NO_WORSE * best.error:
        best = static[0]
    chosen = best if best.error <= tolerance * dynamic.error else dynamic
    others = sorted((c for c in [*static, dynamic] if c is not chosen), key=lambda c: c.error)
    comparison = f"best static error {best.error:.3g} ({_name(best)}), per-token {dynamic.error:.3g}"
    return Search((chosen, *others), f"{comparison}: {chosen.scheme}")


def _name(candidate: Candidate) -> str:
    return f"smoothquant {candidate.alpha:g}" if candidate.equalization == "smoothquant" else candidate.equalization
