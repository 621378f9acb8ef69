"""What is to be analyzed: model, data, recipe and metric, and how the data become a metric."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fptq_onnx.analysis.metrics import (
    METRICS,
    CosineMetric,
    EntryPointMetric,
    LanguageMetric,
    LastWordMetric,
    Metric,
    Passage,
)
from fptq_onnx.analysis.store import digest
from fptq_onnx.calibration.data import calibration_data
from fptq_onnx.calibration.tokens import (
    encode_text,
    encode_windows,
    find_tokenizer,
    load_tokenizer,
    read_text,
    token_windows,
)
from fptq_onnx.errors import CalibrationError, why_unreadable
from fptq_onnx.graph.feeds import Feeds, ModelInputs, describe_inputs
from fptq_onnx.graph.model_file import source_files
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import versions
from fptq_onnx.runtime import Provider

__all__ = ["Request", "open_metric"]

# Sequences that an encoder's embeddings are compared on; longer ones would leave too few of them.
_ENCODER_WINDOW = 64


@dataclass(frozen=True)
class Request:
    """Everything that decides the measurements; it can be sent to another process that sees the same files.

    Attributes:
        model: Float ONNX model.
        text: UTF-8 text that the metric is computed on, or an .npz file of feeds.
        calibration: Text or .npz that activations are observed on; None for random tokens.
        tokenizer: tokenizer.json; None for the one beside the model.
        recipe: The recipe to judge.
        metric: "kl", "perplexity", "last-word", "cosine", "module:function", or None for what fits the model.
        tokens: Tokens of the text to measure on, rounded up to whole windows.
        window: Tokens per window.
        provider: Where sessions run.
        skip: Windows, sequences or passages of the text to pass over, to reach what an analysis did not see.
        options: How a command line asks for the recipe, for the commands that findings end in.
    """

    model: Path
    text: Path
    calibration: Path | None
    tokenizer: Path | None
    recipe: Recipe
    metric: str | None = None
    tokens: int = 2000
    window: int = 512
    provider: Provider = "cpu"
    skip: int = 0
    options: tuple[str, ...] = ("--recipe", "paper")

    def fingerprint(self, model: ir.Model) -> str:
        """Changes with whatever could change a measurement: the files' contents, the settings, the versions."""
        files = [*sorted(source_files(model)), self.text]
        files += [path for path in (self.calibration, self.tokenizer_path()) if path is not None]
        settings = [self.recipe.resolved(), self.metric, self.tokens, self.window, self.provider]
        installed = {name: version for name, version in versions().items() if name != "platform"}
        return digest([_file_digest(path) for path in files], settings, installed)

    def tokenizer_path(self) -> Path | None:
        """The tokenizer to use."""
        return self.tokenizer or find_tokenizer(self.model)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CalibrationError(str(path), why_unreadable(error), "Check the path") from error


def open_metric(request: Request, model: ir.Model) -> tuple[Metric, list[Feeds]]:
    """The metric on its data, and the data as batches for observing activations.

    Raises:
        CalibrationError: The text is missing or too short, or the metric does not fit the model.
    """
    inputs, outputs = describe_inputs(model), _outputs(model)
    name = request.metric or ("kl" if _logits(outputs) else "cosine")
    if name not in METRICS and ":" not in name:
        raise CalibrationError(f"metric {name!r}", "it is unknown", f"Use {', '.join(METRICS)} or module:function")
    if ":" in name:
        return EntryPointMetric(name, inputs), _batches(request, inputs)
    if name == "cosine":
        batches = _batches(request, inputs)
        return CosineMetric(inputs, batches, next(iter(outputs))), batches
    logits = _logits(outputs)
    if logits is None:
        raise CalibrationError(
            f"metric {name!r}", f"the model gives no logits per token, only {', '.join(outputs)}", "Use cosine"
        )
    if name == "last-word":
        passages = _passages(request, inputs)
        return LastWordMetric(passages, logits), [passage.feeds for passage in passages]
    windows = _windows(request, inputs)
    batches = [inputs.feeds(ids[None], where=f"window {index}") for index, ids in enumerate(windows)]
    return LanguageMetric(name, batches, list(windows), logits), batches


def _outputs(model: ir.Model) -> dict[str, int]:
    """Rank of each output by name, caches left out."""
    return {
        str(value.name): len(value.shape or ())
        for value in model.graph.outputs
        if not str(value.name).startswith("present")
    }


def _logits(outputs: dict[str, int]) -> str | None:
    return next((name for name, rank in outputs.items() if "logits" in name and rank == 3), None)


def _windows(request: Request, inputs: ModelInputs) -> np.ndarray:
    """Consecutive windows of the text, [n, window]."""
    ids = encode_text(load_tokenizer(_tokenizer(request)), read_text(request.text), str(request.text))
    window = inputs.window(min(request.window, max(2, ids.size)))
    return token_windows(ids, window)[request.skip : request.skip + -(-request.tokens // window)]


def _batches(request: Request, inputs: ModelInputs) -> list[Feeds]:
    """Sequences of the text, each as a prompt, or the samples of an .npz file."""
    if request.text.suffix == ".npz":
        data = calibration_data(request.text, inputs)
        return [inputs.complete(batch, f"sample {index}") for index, batch in enumerate(data)]
    length = inputs.window(min(request.window, _ENCODER_WINDOW))
    every = encode_windows(load_tokenizer(_tokenizer(request)), read_text(request.text), length, str(request.text))
    chosen = every[request.skip : request.skip + -(-request.tokens // every.shape[1])]
    return [inputs.feeds(ids[None], where=f"sequence {index}") for index, ids in enumerate(chosen)]


def _passages(request: Request, inputs: ModelInputs) -> list[Passage]:
    tokenizer = load_tokenizer(_tokenizer(request))
    lines = read_text(request.text).splitlines()
    every = (passage for line in lines if (passage := Passage.of_text(line, tokenizer, inputs)) is not None)
    passages: list[Passage] = []
    tokens = 0
    for passage in islice(every, request.skip, None):
        if tokens >= request.tokens:
            break
        passages.append(passage)
        tokens += passage.token_ids.size
    if not passages:
        raise CalibrationError(
            str(request.text), "no line is a passage whose last word could be predicted", "Give one passage per line"
        )
    return passages


def _tokenizer(request: Request) -> Path:
    path = request.tokenizer_path()
    if path is None:
        raise CalibrationError(str(request.model), "there is no tokenizer.json beside it", "Give one with --tokenizer")
    return path
