"""Perplexity, and divergence from a reference model in the same pass, over windows of one long text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.calibration.tokens import token_windows
from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.language_model import LanguageModel
from fptq_onnx.progress import Progress, SilentProgress

__all__ = [
    "Evaluation",
    "Perplexity",
    "TokenScores",
    "divergence",
    "evaluate",
    "log_softmax",
    "perplexity",
    "score_tokens",
]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

# Rows of logits in float64 at a time: 13 MB for a vocabulary of 50,000, 64 MB for one of 256,000.
_ROWS = 32


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        tokens: Predicted tokens, window - 1 per window.
        seconds: Time inside the session, without tokenizing and scoring.
        tokens_per_second: Tokens run (windows x window) per second.
    """

    perplexity: float
    tokens: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation(Perplexity):
    """Perplexity, and the distance from a reference model over the same tokens; None without a reference.

    Attributes:
        kl_mean: Mean KL(reference || model) per predicted token, in nats.
        top1_agreement: Share of positions where both models' most likely token is the same.
        reference_perplexity: Perplexity of the reference.
    """

    kl_mean: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of rows of logits, float64 [rows]; all but the first None without a reference.

    Attributes:
        nll: -log p(target) of the model.
        reference_nll: The same of the reference.
        kl: KL(reference || model) in nats.
        agrees: Whether the most likely tokens are the same, bool [rows].
    """

    nll: Float64
    reference_nll: Float64 | None = None
    kl: Float64 | None = None
    agrees: npt.NDArray[np.bool_] | None = None


def log_softmax(logits: Array) -> Float64:
    """Logarithm of the softmax over the last axis, in float64, shifted by the maximum so that nothing overflows."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def score_tokens(logits: Array, targets: npt.NDArray[np.int64], reference: Array | None = None) -> TokenScores:
    """Score each row of logits [rows, vocabulary], a few rows at a time in float64.

    Args:
        logits: Logits of the model, any floating type.
        targets: The tokens that came, int64 [rows].
        reference: Logits of the reference model, [rows, vocabulary].
    """
    nll, reference_nll, kl = np.zeros(len(logits)), np.zeros(len(logits)), np.zeros(len(logits))
    for rows in _chunks(logits):
        log_q = log_softmax(logits[rows])
        nll[rows] = -np.take_along_axis(log_q, targets[rows, None], axis=1)[:, 0]
        if reference is not None:
            log_p = log_softmax(reference[rows])
            reference_nll[rows] = -np.take_along_axis(log_p, targets[rows, None], axis=1)[:, 0]
            kl[rows] = _kl(log_p, log_q)
    if reference is None:
        return TokenScores(nll)
    return TokenScores(nll, reference_nll, kl, reference.argmax(axis=-1) == logits.argmax(axis=-1))


def divergence(reference: Array, logits: Array) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """KL(reference || model) in nats [rows] of logits [rows, vocabulary], and whether their argmax agrees [rows]."""
    kl = np.zeros(len(logits))
    for rows in _chunks(logits):
        kl[rows] = _kl(log_softmax(reference[rows]), log_softmax(logits[rows]))
    return kl, reference.argmax(axis=-1) == logits.argmax(axis=-1)


def perplexity(
    model: LanguageModel,
    token_ids: npt.ArrayLike,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text cut into non-overlapping windows, the rest dropped; see `evaluate`."""
    result = evaluate(model, token_ids, window=window, max_tokens=max_tokens, progress=progress)
    return Perplexity(result.perplexity, result.tokens, result.seconds, result.tokens_per_second)


def evaluate(
    model: LanguageModel,
    token_ids: npt.ArrayLike,
    *,
    against: LanguageModel | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    text: str = "text",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model`, and its divergence from `against` on the same windows, one window in memory at a time.

    The convention of WikiText-2 results: one concatenated text, non-overlapping windows, the rest dropped, and
    window - 1 predicted tokens per window.

    Args:
        model: The model to judge.
        token_ids: Ids of the whole text.
        against: The reference, normally the float model.
        window: Tokens per window, shortened to what the model takes; a fixed sequence length overrides it.
        max_tokens: Stop at the last whole window within this many predicted tokens (but take one at least).
        text: How to name the text in an error.
        progress: Told of each window.

    Raises:
        CalibrationError: Less than one window of text, ids outside the vocabulary, models of different vocabularies,
            a model that is not causal, or logits that are NaN.
    """
    window = model.inputs.window(window)
    if window < 2:
        raise CalibrationError("window", f"of {window} tokens predicts nothing", "Use windows of 2 tokens or more")
    windows = token_windows(token_ids, window, text)
    if max_tokens is not None:
        windows = windows[: max(1, max_tokens // (window - 1))]
    model.check_causal(windows[0])
    if against is not None:
        against.check_causal(windows[0])
    nll = reference_nll = kl = seconds = 0.0
    agreeing = 0
    with (progress or SilentProgress()).stage("Evaluating", len(windows)) as advance:
        for index, ids in enumerate(windows):
            where = f"window {index}"
            logits, elapsed = model.run(ids, where)
            reference = None if against is None else against.run(ids, where)[0]
            _check_logits(model, logits, against, reference, ids, where)
            scores = score_tokens(logits[:-1], ids[1:], None if reference is None else reference[:-1])
            seconds += elapsed
            nll += float(scores.nll.sum())
            if scores.reference_nll is not None and scores.kl is not None and scores.agrees is not None:
                reference_nll += float(scores.reference_nll.sum())
                kl += float(scores.kl.sum())
                agreeing += int(np.count_nonzero(scores.agrees))
            if math.isnan(nll + reference_nll):
                name = model.name if against is None or math.isnan(nll) else against.name
                raise CalibrationError(f"{name}, {where}", "gives logits that are NaN", "Check the model in float32")
            advance(1)
    tokens = len(windows) * (window - 1)
    return Evaluation(
        perplexity=_exp(nll / tokens),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=windows.size / seconds,
        kl_mean=None if against is None else kl / tokens,
        top1_agreement=None if against is None else agreeing / tokens,
        reference_perplexity=None if against is None else _exp(reference_nll / tokens),
    )


def _check_logits(
    model: LanguageModel,
    logits: Array,
    against: LanguageModel | None,
    reference: Array | None,
    ids: npt.NDArray[np.int64],
    where: str,
) -> None:
    if int(ids.max()) >= logits.shape[1]:
        raise CalibrationError(
            where,
            f"holds token id {int(ids.max())}, and {model.name} predicts {logits.shape[1]} tokens",
            "Use the tokenizer that belongs to the model",
        )
    if against is not None and reference is not None and reference.shape != logits.shape:
        raise CalibrationError(
            against.name,
            f"has {reference.shape[1]} logits per token, but {model.name} has {logits.shape[1]}",
            "Compare models of one vocabulary",
        )


def _kl(log_p: Float64, log_q: Float64) -> Float64:
    p = np.exp(log_p)
    # p log p -> 0: tokens that the reference excludes (-inf) add nothing.
    difference = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
    total: Float64 = (p * difference).sum(axis=-1)
    return total


def _chunks(logits: Array) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, len(logits), _ROWS))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
