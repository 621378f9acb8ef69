"""Score many models against one reference on the same tokens, with what depends on the reference computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.perplexity import TokenScores

__all__ = ["Reference"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Rows at a time: 16 rows of a vocabulary of 50,000 are 3 MB, which stay in the cache over all steps.
_ROWS = 16


class Reference:
    """Logits of a reference model on one sequence, kept to score others with.

    The divergence is computed from d = y - x, the differences of the two models' logits:
    KL = log E_p[exp(d - m)] with m = E_p[d], where p is the reference's distribution. Exponentials are float32 and sums
    float64; because d is small where models are close, so is the error (below 1e-7 nats). `score_tokens`, which takes
    two logarithms of softmax in float64 for every pair, needs seven times as long.

    Args:
        logits: [rows, vocabulary], any floating type.
        targets: The tokens that came, int64 [rows].
    """

    def __init__(self, logits: Array, targets: npt.NDArray[np.int64]) -> None:
        """Keep the logits; compute their normalization."""
        self._logits = logits
        self._targets = targets
        self._log_sum = np.zeros(len(logits))
        for rows in _chunks(len(logits)):
            x = logits[rows].astype(np.float32)
            peak = x.max(axis=-1, keepdims=True)
            total = np.exp(x - peak).sum(axis=-1, dtype=np.float64)
            self._log_sum[rows] = peak[:, 0].astype(np.float64) + np.log(total)
        self._nll = self._log_sum - _picked(logits, targets)
        self._top = logits.argmax(axis=-1)

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return len(self._targets)

    def score(self, logits: Array) -> TokenScores:
        """Score logits [rows, vocabulary] of another model; all fields are filled, KL(reference || model) in nats.

        Raises:
            CalibrationError: The shape is another than the reference's, or a value is NaN.
        """
        if logits.shape != self._logits.shape:
            raise CalibrationError(
                "logits",
                f"have shape {list(logits.shape)} instead of {list(self._logits.shape)}",
                "Compare models of one vocabulary",
            )
        kl, log_sum = np.zeros(len(logits)), np.zeros(len(logits))
        for rows in _chunks(len(logits)):
            x = self._logits[rows].astype(np.float32)
            d = logits[rows].astype(np.float32) - x
            x -= self._log_sum[rows, None].astype(np.float32)
            p = np.exp(x, out=x)
            mass = p.sum(axis=-1, dtype=np.float64)
            mean = (p * d).sum(axis=-1, dtype=np.float64) / mass
            shift = d.max(axis=-1).astype(np.float64)
            d -= shift[:, None].astype(np.float32)
            np.exp(d, out=d)
            d *= p
            log_mean_exp = np.log(d.sum(axis=-1, dtype=np.float64) / mass) + shift
            kl[rows] = np.maximum(log_mean_exp - mean, 0)
            log_sum[rows] = self._log_sum[rows] + log_mean_exp
        if np.isnan(kl).any():
            raise CalibrationError("logits", "hold NaN", "Check the model in float32")
        nll = log_sum - _picked(logits, self._targets)
        return TokenScores(nll, self._nll, kl, self._top == logits.argmax(axis=-1))


def _picked(logits: Array, targets: npt.NDArray[np.int64]) -> Float64:
    picked: Float64 = np.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(np.float64)
    return picked


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))
