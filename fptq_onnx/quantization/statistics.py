"""Exact, mergeable statistics of an activation: what every choice of a quantization range is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import CalibrationError

__all__ = [
    "HISTOGRAM_BINS",
    "HISTOGRAM_RESOLUTION",
    "ActivationStatistics",
    "histogram_bins",
    "histogram_edges",
    "histogram_of",
]

HISTOGRAM_BINS = 1024
# Bins per unit of |x|^(1/4): bins of 6 % to 0.4 % relative width from 1 to 65536, the range of float16.
HISTOGRAM_RESOLUTION = 64

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def histogram_bins(x: npt.ArrayLike) -> IntArray:
    """Bin of each |x|: min(1023, floor(64 * sqrt(sqrt(|x|)))), computed in float32.

    The fourth root resolves the bulk of an activation and its outliers alike. Its two square roots are correctly
    rounded (IEEE 754), so that numpy, onnxruntime and any batching put a value into the same bin.

    Args:
        x: Finite values of any shape, taken as float32.

    Returns:
        int64 array of the shape of `x`, in 0..1023.
    """
    root = np.sqrt(np.sqrt(np.abs(np.asarray(x, np.float32))))
    return np.minimum(root * np.float32(HISTOGRAM_RESOLUTION), np.float32(HISTOGRAM_BINS - 1)).astype(np.int64)


def histogram_of(x: npt.ArrayLike) -> IntArray:
    """Counts [1024] (int64) of `histogram_bins(x)`."""
    return np.bincount(histogram_bins(x).ravel(), minlength=HISTOGRAM_BINS).astype(np.int64)


def histogram_edges(bins: int = HISTOGRAM_BINS) -> npt.NDArray[np.float64]:
    """Edges [bins + 1] of the bins: bin i holds edges[i] <= |x| < edges[i + 1], the last bin everything above too."""
    return (np.arange(bins + 1, dtype=np.float64) / HISTOGRAM_RESOLUTION) ** 4


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Statistics of an activation X [tokens, K] over all tokens seen.

    Everything is a minimum, a maximum or a count of float32 values, so that merging is exact: splitting the same
    tokens into other batches gives the same bits. Only the order of `token_absmax` follows the order of the tokens.

    Attributes:
        channel_min: Minimum of each channel, float32 [K]; +inf where no token was seen.
        channel_max: Maximum of each channel, float32 [K]; -inf where no token was seen.
        token_absmax: max |X_t| of each token, float32 [tokens].
        histogram: Counts of all |X_tj|, int64 [1024], in the bins of `histogram_bins`.
        tokens: Number of tokens.
    """

    channel_min: FloatArray
    channel_max: FloatArray
    token_absmax: FloatArray
    histogram: IntArray
    tokens: int

    def __post_init__(self) -> None:
        """Refuse parts that cannot belong to one activation."""
        k = self.channel_min.size
        if self.channel_min.shape != (k,) or self.channel_max.shape != (k,):
            raise ValueError(f"channel shapes {self.channel_min.shape}, {self.channel_max.shape} are not one [K]")
        if self.token_absmax.shape != (self.tokens,):
            raise ValueError(f"token_absmax {self.token_absmax.shape} does not hold {self.tokens} tokens")
        if self.histogram.shape != (HISTOGRAM_BINS,) or int(self.histogram.sum()) != self.tokens * k:
            raise ValueError(f"histogram does not count {self.tokens} x {k} values in {HISTOGRAM_BINS} bins")

    @classmethod
    def empty(cls, k: int) -> ActivationStatistics:
        """Statistics of no token of K channels: the neutral element of `merge`."""
        return cls(
            channel_min=np.full(k, np.inf, np.float32),
            channel_max=np.full(k, -np.inf, np.float32),
            token_absmax=np.zeros(0, np.float32),
            histogram=np.zeros(HISTOGRAM_BINS, np.int64),
            tokens=0,
        )

    @classmethod
    def from_activations(cls, x: npt.ArrayLike) -> ActivationStatistics:
        """Statistics of activations [..., K], taken as float32.

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        x = np.asarray(x, np.float32)
        if not np.isfinite(x).all():
            raise CalibrationError("activations", "hold NaN or infinity", "Look for the layer that produces them")
        x = x.reshape(-1, x.shape[-1])
        # Adding zero turns -0 into +0, whose order minimum and maximum leave open.
        return cls(
            channel_min=x.min(axis=0, initial=np.inf) + np.float32(0),
            channel_max=x.max(axis=0, initial=-np.inf) + np.float32(0),
            token_absmax=np.abs(x).max(axis=1, initial=0),
            histogram=histogram_of(x),
            tokens=x.shape[0],
        )

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of the tokens of both; exact, associative, and commutative but for the order of tokens.

        Raises:
            ValueError: The numbers of channels differ.
        """
        if self.k != other.k:
            raise ValueError(f"statistics of {self.k} and {other.k} channels cannot be merged")
        return ActivationStatistics(
            channel_min=np.minimum(self.channel_min, other.channel_min),
            channel_max=np.maximum(self.channel_max, other.channel_max),
            token_absmax=np.concatenate([self.token_absmax, other.token_absmax]),
            histogram=self.histogram + other.histogram,
            tokens=self.tokens + other.tokens,
        )

    @property
    def k(self) -> int:
        """Number of channels."""
        return int(self.channel_min.size)

    @property
    def channel_absmax(self) -> FloatArray:
        """Largest |X_j| of each channel, float32 [K]; 0 where no token was seen."""
        return np.maximum(np.maximum(-self.channel_min, self.channel_max), np.float32(0))

    @property
    def absmax(self) -> float:
        """Largest |X|: the activation range v of FPTQ (arXiv 2308.15987)."""
        return float(self.channel_absmax.max(initial=0))

    def to_dict(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by field name (`tokens` is int64 [1]), for storage; `from_dict` reads them back bit for bit."""
        return {
            "channel_min": self.channel_min,
            "channel_max": self.channel_max,
            "token_absmax": self.token_absmax,
            "histogram": self.histogram,
            "tokens": np.array([self.tokens], np.int64),
        }

    @classmethod
    def from_dict(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> ActivationStatistics:
        """Rebuild what `to_dict` gave.

        Raises:
            ValueError: The arrays do not fit together.
        """
        return cls(
            channel_min=np.asarray(arrays["channel_min"], np.float32),
            channel_max=np.asarray(arrays["channel_max"], np.float32),
            token_absmax=np.asarray(arrays["token_absmax"], np.float32),
            histogram=np.asarray(arrays["histogram"], np.int64),
            tokens=int(arrays["tokens"][0]),
        )
