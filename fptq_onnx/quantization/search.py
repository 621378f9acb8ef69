"""Choose scheme and equalization of an activation by the output error of the quantized layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.quantization.equalize import (
    lae_scale,
    round_mantissa,
    scale_rows,
    shift_output,
    smooth,
    smoothquant_scale,
)
from fptq_onnx.quantization.int4 import Float32, Grid, quantize_weight
from fptq_onnx.quantization.policy import EqualizationMethod, Scheme
from fptq_onnx.quantization.static_range import activation_qparams

__all__ = [
    "ALPHAS",
    "Candidate",
    "OutputError",
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
        shift: float32 [K] that the activation loses before it is divided, or None.
    """

    scheme: Scheme
    equalization: EqualizationMethod
    alpha: float
    scale: Float32 | None
    error: float
    shift: Float32 | None = None


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


class OutputError:
    """Squared output error of the quantized layers behind one activation over their squared output.

    Weights are rounded to nearest with the samples' mean squares as importance: a later GPTQ lowers all errors alike.

    Args:
        samples: float32 [tokens, K], inputs of the layers, the leading tokens of a sequence among them.
        weights: The layers' weights, float32 [K, N_i] each.
        channel_min: [K] over all of calibration: static ranges cover more than the samples.
        channel_max: [K], likewise.
        group_size: Rows per weight scale.
        grid: Weight grid; None leaves the weights float.
        symmetric: Zero point 128 for static activations.
        token_cap: See `token_weights`.
        bias_correction: The layers' biases make up for what rounding the weights moves the mean outputs by.
    """

    def __init__(
        self,
        samples: Float32,
        weights: Sequence[Float32],
        channel_min: FloatArray,
        channel_max: FloatArray,
        *,
        group_size: int,
        grid: Grid | None,
        symmetric: bool = True,
        token_cap: float = 16.0,
        bias_correction: bool = False,
    ) -> None:
        """Compute the float outputs."""
        self._bias_correction = bias_correction
        self._samples, self._weights = samples, weights
        self._low, self._high = np.asarray(channel_min, np.float32), np.asarray(channel_max, np.float32)
        self._group_size, self._grid, self._symmetric = group_size, grid, symmetric
        self._targets = [samples @ w for w in weights]
        self._counted = token_weights(samples, token_cap)[:, None]

    def __call__(self, *, scale: Float32 | None = None, shift: Float32 | None = None, per_token: bool = False) -> float:
        """The error with X quantized as (X - shift) / scale."""
        x = smooth(self._samples, scale, shift)
        low, high = (smooth(extreme, scale, shift) for extreme in (self._low, self._high))
        seen = (
            quantize_per_token(x)
            if per_token
            else quantize_static(x, float(low.min()), float(high.max()), symmetric=self._symmetric)
        )
        noise = signal = 0.0
        for w, target in zip(self._weights, self._targets, strict=True):
            rows = w if scale is None else scale_rows(w, scale)
            stored = self._stored(rows, seen)
            output = seen @ stored
            if self._bias_correction:
                output += x.mean(axis=0) @ (rows - stored)
            if shift is not None:
                output += shift_output(shift, w)
            noise += float(np.sum(self._counted * np.square(output - target, dtype=np.float64)))
            signal += float(np.sum(self._counted * np.square(target, dtype=np.float64)))
        return noise / signal if signal > 0 else (0.0 if noise == 0 else float("inf"))

    def _stored(self, rows: Float32, seen: Float32) -> Float32:
        if self._grid is None:
            return rows
        importance = np.mean(np.square(seen, dtype=np.float64), axis=0)
        return quantize_weight(rows, self._group_size, self._grid, np.float32, importance=importance).dequantize()


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
    shift: Float32 | None = None,
    bias_correction: bool = False,
) -> Search:
    """Quantize the layers behind one activation in every way and keep the best static one if it is good enough.

    The candidates are plain static, LAE, SmoothQuant with `ALPHAS`, and per token; with a shift, each of them once more
    for the shifted activation, whose own range then gives the scale.

    Args:
        samples: As for `OutputError`, like the next three.
        weights: The layers' weights.
        channel_min: Minimum of each channel.
        channel_max: Maximum of each channel.
        group_size: Rows per weight scale.
        grid: Weight grid.
        symmetric: Zero point 128 for static candidates.
        floor: Smallest equalization scale relative to the median.
        tolerance: A static candidate wins if its error is at most this multiple of the per-token error: static scales
            cost nothing at run time.
        token_cap: See `token_weights`.
        scale_bits: Significant bits of equalization scales, 0 for all.
        shift: float32 [K] that the activation may lose at no cost (see `channel_shift`), or None.
        bias_correction: See `OutputError`.

    Returns:
        The candidates, the chosen one first, the rest by error.
    """
    error = OutputError(
        samples,
        weights,
        channel_min,
        channel_max,
        group_size=group_size,
        grid=grid,
        symmetric=symmetric,
        token_cap=token_cap,
        bias_correction=bias_correction,
    )
    weight_absmax = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)

    def kept(scale: Float32) -> Float32:
        return round_mantissa(scale, scale_bits) if scale_bits else scale

    plain, equalized, dynamic = list[Candidate](), list[Candidate](), list[Candidate]()
    for z in (None,) if shift is None else (None, shift):
        low, high = (smooth(np.asarray(extreme, np.float32), None, z) for extreme in (channel_min, channel_max))
        absmax = np.maximum(np.abs(low), np.abs(high))
        plain.append(Candidate(Scheme.STATIC, "none", 0.0, None, error(shift=z), z))
        scale = kept(lae_scale(absmax, floor))
        equalized.append(Candidate(Scheme.EQUALIZED_STATIC, "lae", 0.0, scale, error(scale=scale, shift=z), z))
        for alpha in ALPHAS:
            scale = kept(smoothquant_scale(absmax, weight_absmax, alpha, floor))
            found = error(scale=scale, shift=z)
            equalized.append(Candidate(Scheme.EQUALIZED_STATIC, "smoothquant", alpha, scale, found, z))
        dynamic.append(Candidate(Scheme.PER_TOKEN, "none", 0.0, None, error(shift=z, per_token=True), z))
    simple, moving = _best(plain), _best(dynamic)
    best = _best([*plain, *equalized])
    if simple.error <= _NO_WORSE * best.error:
        best = simple
    chosen = best if best.error <= tolerance * moving.error else moving
    others = sorted((c for c in [*plain, *equalized, *dynamic] if c is not chosen), key=lambda c: c.error)
    comparison = f"best static error {best.error:.3g} ({_name(best)}), {_name(moving, 'per-token')} {moving.error:.3g}"
    return Search((chosen, *others), f"{comparison}: {chosen.scheme}")


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of least error, the first of equals."""
    return min(candidates, key=lambda candidate: candidate.error)


def _name(candidate: Candidate, name: str = "") -> str:
    if not name:
        smoothquant = candidate.equalization == "smoothquant"
        name = f"smoothquant {candidate.alpha:g}" if smoothquant else candidate.equalization
    return name if candidate.shift is None else f"shifted {name}" if name != "none" else "shifted"
