"""What a measurement measures: how much worse a quantized model is than its float model, on fixed data."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.causality import check_causal
from fptq_onnx.evaluation.compare import compare_embeddings, embed
from fptq_onnx.evaluation.reference import Reference
from fptq_onnx.graph.feeds import Feeds, ModelInputs
from fptq_onnx.graph.lookups import TOKEN_NAMES

__all__ = ["METRICS", "CosineMetric", "EntryPointMetric", "LanguageMetric", "LastWordMetric", "Metric", "Passage"]

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

METRICS = ("kl", "perplexity", "last-word", "cosine")


class Metric(ABC):
    """A figure of merit of a model on fixed data.

    Attributes:
        name: As given to `--metric`.
        unit: Unit of the value, for axes and tables.
        loss_unit: Unit of the loss.
        higher_is_better: Whether a larger value is a better model.
    """

    name: str
    unit: str
    loss_unit: str
    higher_is_better: bool = False

    @abstractmethod
    def evaluate(self, run: Run) -> dict[str, float]:
        """Figures of a model, the metric's own under its name; the float model has been evaluated first.

        Args:
            run: Outputs by name from complete feeds.
        """

    def loss(self, figures: Mapping[str, float], baseline: Mapping[str, float]) -> float:
        """How much worse than the float model, in `loss_unit`; 0 for the float model."""
        difference = figures[self.name] - baseline[self.name]
        return -difference if self.higher_is_better else difference


class LanguageMetric(Metric):
    """Perplexity of the quantized model and its divergence from the float model, over windows of one text.

    Each run gives both, and the share of tokens at which both models' most likely token is the same ("top1").

    Args:
        name: "kl" (mean KL(float || quantized) per predicted token in nats) or "perplexity".
        windows: Feeds of one window each.
        token_ids: Their tokens, int64 [window] each.
        logits: Name of the output [1, S, vocabulary].
    """

    def __init__(self, name: str, windows: Sequence[Feeds], token_ids: Sequence[Array], logits: str) -> None:
        """Keep the data; the reference comes with the first evaluation."""
        self.name = name
        self.unit = "nats per token" if name == "kl" else "perplexity"
        self.loss_unit = self.unit if name == "kl" else "perplexity above float"
        self._windows, self._token_ids, self._logits = windows, token_ids, logits
        self._references: list[Reference] = []

    def evaluate(self, run: Run) -> dict[str, float]:
        """`kl`, `perplexity` and `top1`; the first run is the reference of the others.

        Raises:
            CalibrationError: The metric is perplexity and the first model is not causal.
        """
        first = not self._references
        if first and self.name == "perplexity":
            _check_causal(run, self._windows[0], self._logits)
        kl = nll = agreeing = 0.0
        for index, (feeds, ids) in enumerate(zip(self._windows, self._token_ids, strict=True)):
            logits = run(feeds)[self._logits][0, :-1]
            if first:
                self._references.append(Reference(logits, ids[1:]))
            scores = self._references[index].score(logits)
            assert scores.kl is not None and scores.agrees is not None
            kl += float(scores.kl.sum())
            nll += float(scores.nll.sum())
            agreeing += float(np.count_nonzero(scores.agrees))
        tokens = sum(reference.tokens for reference in self._references)
        perplexity = math.exp(min(nll / tokens, 700.0))
        return {"kl": kl / tokens, "perplexity": perplexity, "top1": agreeing / tokens}


class Passage:
    """A text whose last word is to be predicted (LAMBADA): feeds, and where the tokens of the word are.

    Args:
        feeds: The whole passage.
        token_ids: Its tokens, int64 [S].
        start: Index of the first token of the last word, at least 1.
    """

    def __init__(self, feeds: Feeds, token_ids: Array, start: int) -> None:
        """Keep it."""
        self.feeds, self.token_ids, self.start = feeds, token_ids, start

    @classmethod
    def of_text(cls, text: str, tokenizer: Tokenizer, inputs: ModelInputs) -> Passage | None:
        """Encode one line; None where nothing stands before its last word, or it is longer than the model takes."""
        line = text.strip()
        space = line.rfind(" ")
        if space < 1:
            return None
        encoding = tokenizer.encode(line)
        ids = np.array(encoding.ids, np.int64)
        start = next((i for i, (_, end) in enumerate(encoding.offsets) if end > space + 1), 0)
        if start < 1 or ids.size > inputs.window(ids.size):
            return None
        return cls(inputs.feeds(ids[None], where=f"passage {line[:24]!r}"), ids, start)


class LastWordMetric(Metric):
    """Share of passages whose last word the model predicts whole, each of its tokens being the most likely one."""

    name, unit, loss_unit, higher_is_better = "last-word", "accuracy", "accuracy lost", True

    def __init__(self, passages: Sequence[Passage], logits: str) -> None:
        """Keep the data."""
        self._passages, self._logits = passages, logits
        self._checked = False

    def evaluate(self, run: Run) -> dict[str, float]:
        """The accuracy. Feeding the true word equals greedy decoding for all-or-nothing matches.

        Raises:
            CalibrationError: The first model is not causal: it would see the word.
        """
        if not self._checked:
            _check_causal(run, self._passages[0].feeds, self._logits)
            self._checked = True
        right = 0
        for passage in self._passages:
            predicted = run(passage.feeds)[self._logits][0].argmax(axis=-1)
            right += bool((predicted[passage.start - 1 : -1] == passage.token_ids[passage.start :]).all())
        return {self.name: right / len(self._passages)}


class CosineMetric(Metric):
    """Mean cosine similarity of the embeddings of a float and a quantized encoder (see `evaluation.compare.embed`)."""

    name, unit, loss_unit, higher_is_better = "cosine", "cosine similarity", "1 - cosine similarity", True

    def __init__(self, inputs: ModelInputs, batches: Sequence[Feeds], output: str) -> None:
        """Keep the data; the reference comes with the first evaluation."""
        self._inputs, self._batches, self._output = inputs, batches, output
        self._reference: Array | None = None

    def evaluate(self, run: Run) -> dict[str, float]:
        """The similarity; the first run is the reference of the others."""
        embedded = embed(_AsSession(run), self._inputs, self._batches, self._output)
        if self._reference is None:
            self._reference = embedded
        return {self.name: compare_embeddings(self._reference, embedded).cosine_mean}


class EntryPointMetric(Metric):
    """A Python function `module:function` that takes a callable model and returns a score, larger being better.

    The model maps feeds (arrays by input name; what follows from token ids may be missing) to outputs by name.
    """

    unit, loss_unit, higher_is_better = "score", "score lost", True

    def __init__(self, path: str, inputs: ModelInputs) -> None:
        """Import the function.

        Raises:
            CalibrationError: There is no such module or function.
        """
        self.name = path
        self._inputs = inputs
        module, _, function = path.partition(":")
        try:
            self._function = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise CalibrationError(
                f"metric {path!r}", f"it cannot be imported ({error})", "Give module:function, importable from here"
            ) from None

    def evaluate(self, run: Run) -> dict[str, float]:
        """What the function returns, as a number."""
        score = self._function(lambda feeds: run(self._inputs.complete(feeds, f"feeds of {self.name}")))
        try:
            return {self.name: float(score)}
        except (TypeError, ValueError):
            raise CalibrationError(
                f"metric {self.name!r}", f"it returned {score!r}, which is not a number", "Return a float"
            ) from None


def _check_causal(run: Run, feeds: Feeds, logits: str) -> None:
    name = next(name for name in TOKEN_NAMES if name in feeds)
    tokens = feeds[name]
    check_causal(
        lambda ids: run({**feeds, name: ids[None].astype(tokens.dtype)})[logits][0],
        tokens[0].astype(np.int64),
        "the model",
    )


class _AsSession:
    """What `embed` takes of an onnxruntime session."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def run(self, names: list[str], feeds: Mapping[str, Array]) -> list[Array]:
        outputs = self._run(feeds)
        return [outputs[name] for name in names]
