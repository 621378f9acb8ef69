"""The FPTQ activation policy: from the statistics and recipe of one activation to a scheme, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fptq_onnx.quantization.equalize import equalized_absmax, lae_scale, round_mantissa, smooth, smoothquant_scale

__all__ = ["Decision", "EqualizationMethod", "PolicySettings", "Scheme", "activation_range", "choose_scheme", "decide"]

EqualizationMethod = Literal["none", "lae", "smoothquant"]
RangeKind = Literal["absmax", "span"]
FloatArray = npt.NDArray[np.floating[Any]]
Float32 = npt.NDArray[np.float32]


class Scheme(StrEnum):
    """How one activation becomes int8."""

    STATIC = "static"
    EQUALIZED_STATIC = "equalized-static"
    PER_TOKEN = "per-token"
    FLOAT = "float"

    @property
    def is_static(self) -> bool:
        """Whether the scale is a constant of the model (no work per token)."""
        return self in (Scheme.STATIC, Scheme.EQUALIZED_STATIC)


@dataclass(frozen=True)
class PolicySettings:
    """What the policy needs to know of a recipe.

    Attributes:
        v0: Ranges up to v0 are static as they are (FPTQ: 15).
        v1: Ranges from v1 on are quantized per token (FPTQ: 150).
        range_kind: The range v: "absmax" is max |X|, "span" is max X - min X.
        scheme: A scheme for every activation, or None for the policy.
        equalization: The scale of the middle bucket.
        alpha: SmoothQuant's exponent.
        floor: Smallest equalization scale as a fraction of the median.
        scale_bits: Significant bits of equalization scales, 0 for all.
        insist: Equalize where it is asked for even if that does not even out the channels: a plan says so.
    """

    v0: float = 15.0
    v1: float = 150.0
    range_kind: RangeKind = "absmax"
    scheme: Scheme | None = None
    equalization: EqualizationMethod = "lae"
    alpha: float = 0.5
    floor: float = 1e-2
    scale_bits: int = 0
    insist: bool = False


@dataclass(frozen=True, eq=False)
class Decision:
    """What happens to one activation and to the layers that read it.

    Attributes:
        scheme: The scheme.
        activation_range: v before equalization.
        equalization: The method applied, "none" unless the scheme is EQUALIZED_STATIC.
        equalization_scale: float32 [K] to divide the activation by, or None.
        equalized_range: v after equalization with this scale (equal to ``activation_range`` without one).
        reason: One clause for the report.
        alpha: SmoothQuant's exponent where it was searched for.
        shift: float32 [K] that the activation loses before it is divided, or None.
    """

    scheme: Scheme
    activation_range: float
    equalization: EqualizationMethod
    equalization_scale: Float32 | None
    equalized_range: float
    reason: str
    alpha: float | None = None
    shift: Float32 | None = None

    def smooth(self, x: FloatArray) -> FloatArray:
        """What is quantized of X [..., K]: X less the shift, over the equalization scale."""
        return smooth(x, self.equalization_scale, self.shift)


def activation_range(channel_min: FloatArray, channel_max: FloatArray, kind: RangeKind = "absmax") -> float:
    """The range v of an activation from its per-channel extremes [K]; 0 for K = 0."""
    low = float(np.min(channel_min, initial=0.0))
    high = float(np.max(channel_max, initial=0.0))
    if kind == "span":
        # a channel that never reaches 0 must not count its distance from 0 as spread
        return float(np.max(channel_max) - np.min(channel_min)) if len(channel_min) else 0.0
    return max(-low, high)


def choose_scheme(v: float, v0: float = 15.0, v1: float = 150.0) -> Scheme:
    """FPTQ's buckets: v <= v0 static, v0 < v < v1 equalized static, v >= v1 (or not finite) per token."""
    if v <= v0:
        return Scheme.STATIC
    return Scheme.EQUALIZED_STATIC if v < v1 else Scheme.PER_TOKEN


def decide(
    channel_min: FloatArray,
    channel_max: FloatArray,
    settings: PolicySettings,
    *,
    weight_absmax: FloatArray | None = None,
) -> Decision:
    """Decide for one activation; all layers that read it share the decision.

    Args:
        channel_min: [K], per-channel minimum over the calibration tokens.
        channel_max: [K], per-channel maximum.
        settings: Thresholds and methods.
        weight_absmax: [K], largest |W| of each input channel over all layers that read the activation; needed by the
            equalization "smoothquant".

    Returns:
        The decision. An equalization that would not shrink the range is refused and the activation quantized per token.
    """
    v = activation_range(channel_min, channel_max, settings.range_kind)
    if not np.isfinite(v):
        return _plain(Scheme.FLOAT, v, "the calibrated range is not finite: float")
    if settings.scheme is None:
        scheme = choose_scheme(v, settings.v0, settings.v1)
        where = _bucket(v, settings)
    else:
        scheme, where = settings.scheme, f"range {v:.4g}, the recipe asks for {settings.scheme} everywhere"
    if scheme is not Scheme.EQUALIZED_STATIC:
        return _plain(scheme, v, where if settings.scheme is not None else f"{where}: {scheme}")
    if settings.equalization == "none":
        if settings.scheme is not None:
            return _plain(Scheme.STATIC, v, f"{where}, but equalization is off: static")
        return _plain(Scheme.PER_TOKEN, v, f"{where}, but equalization is off: per-token")
    channel_absmax = np.maximum(np.abs(channel_min), np.abs(channel_max))
    scale = _equalization_scale(channel_absmax, weight_absmax, settings)
    after = activation_range(
        np.asarray(channel_min, np.float32) / scale, np.asarray(channel_max, np.float32) / scale, settings.range_kind
    )
    spread_before = _spread(channel_absmax)
    spread_after = _spread(equalized_absmax(channel_absmax, scale))
    if spread_after >= spread_before and not settings.insist:
        fallback = Scheme.PER_TOKEN if settings.scheme is None else Scheme.STATIC
        return _plain(fallback, v, f"{where}, but {settings.equalization} does not even out the channels: {fallback}")
    return Decision(
        Scheme.EQUALIZED_STATIC, v, settings.equalization, scale, after, f"{where}: equalized to {after:.4g}"
    )


def _plain(scheme: Scheme, v: float, reason: str) -> Decision:
    return Decision(scheme, v, "none", None, v, reason)


def _bucket(v: float, settings: PolicySettings) -> str:
    if v <= settings.v0:
        return f"range {v:.4g} up to {settings.v0:g}"
    if v < settings.v1:
        return f"range {v:.4g} between {settings.v0:g} and {settings.v1:g}"
    return f"range {v:.4g} from {settings.v1:g} on"


def _equalization_scale(
    channel_absmax: FloatArray, weight_absmax: FloatArray | None, settings: PolicySettings
) -> Float32:
    if settings.equalization == "lae":
        scale = lae_scale(channel_absmax, settings.floor)
    elif weight_absmax is None:
        raise ValueError("equalization 'smoothquant' needs the weights' per-channel maxima")
    else:
        scale = smoothquant_scale(channel_absmax, weight_absmax, settings.alpha, settings.floor)
    return round_mantissa(scale, settings.scale_bits) if settings.scale_bits else scale


def _spread(channel_absmax: FloatArray) -> float:
    """Largest over median channel maximum of the live channels: what one shared scale wastes."""
    live = channel_absmax[channel_absmax > 0]
    return float(np.max(live) / np.median(live)) if live.size else 1.0
