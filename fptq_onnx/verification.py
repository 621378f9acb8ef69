"""Runs a converted model again and compares it with its float original: as a whole, and layer by layer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.runner import SessionFactory
from fptq_onnx.calibration.walk import Walk
from fptq_onnx.errors import ModelError
from fptq_onnx.evaluation.compare import LayerPair, NoiseMeter, layer_snr
from fptq_onnx.evaluation.perplexity import divergence
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.opset import ensure_opset
from fptq_onnx.graph.segments import Segment, Segmentation, find_segments, segments_between
from fptq_onnx.ops import DOMAIN, get_library_path
from fptq_onnx.progress import Progress
from fptq_onnx.report import Verification
from fptq_onnx.runtime import PROVIDERS, Provider, session
from fptq_onnx.storage.states import States

__all__ = ["Comparison", "OutputMeter", "compare_layers", "compare_models"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Batch = Mapping[str, Array]

LOGITS = "logits"


def compare_models(
    reference: Path,
    converted: Path,
    batches: Sequence[Batch],
    *,
    data: str,
    max_kl: float | None,
    provider: Provider,
    threads: int | None = None,
    progress: Progress,
) -> Verification:
    """Compare the first outputs of two model files on the same feeds; of language models also the distributions.

    Padding takes part in the first comparison only.

    Args:
        reference: The float model.
        converted: The quantized model, as saved.
        batches: Feeds, completed from token ids.
        data: What the batches are, for the report.
        max_kl: Largest acceptable mean KL(reference || converted) per token in nats.
        provider: Where both run.
        threads: Of each session, onnxruntime's choice if None.
        progress: Told of each batch.

    Raises:
        ModelError: A model cannot be opened, or the converted one gives NaN, infinity or another shape.
    """
    models = (load_model(reference), load_model(converted))
    # The converted model is opened as its users open it; the other may be a link, or have names that are not unique.
    sessions = [
        memory_session(models[0], PROVIDERS[provider], threads=threads),
        session(converted, provider, register_library=DOMAIN in models[1].graph.opset_imports, threads=threads),
    ]
    output = str(models[0].graph.outputs[0].name)
    meter = OutputMeter(output, reference, converted)
    inputs = [describe_inputs(model) for model in models]
    with progress.stage("Verifying", len(batches)) as advance:
        for index, batch in enumerate(batches, start=1):
            feeds = [spec.complete(batch, f"verification batch {index}") for spec in inputs]
            results = []
            for path, opened, fed in zip((reference, converted), sessions, feeds, strict=True):
                try:
                    results += opened.run([output], fed)
                except Exception as error:  # onnxruntime's exceptions share no base class
                    reason = f"verification batch {index} cannot be run: {error}"
                    raise ModelError(str(path), reason, "Check the model and the data in onnxruntime") from error
            theirs, ours = results
            meter.add(theirs, ours, inputs[0].token_positions(feeds[0]))
            advance(1)
    return meter.result(data, max_kl)


class OutputMeter:
    """Compares the first outputs of two models, batch by batch.

    Args:
        output: Name of the output; "logits" are compared as distributions too.
        reference: The float model's file, for errors.
        converted: The quantized model's file, likewise.
    """

    def __init__(self, output: str, reference: Path, converted: Path) -> None:
        """Nothing seen yet."""
        self._output, self._reference, self._converted = output, reference, converted
        self._batches = 0
        self._noise = NoiseMeter()
        self._kl, self._agreeing, self._tokens, self._scored = 0.0, 0, 0, 0

    def add(self, theirs: Array, ours: Array, positions: npt.NDArray[np.int64] | None) -> None:
        """Count one batch.

        Args:
            theirs: Of the float model.
            ours: Of the quantized one.
            positions: Positions of the tokens, -1 for padding; None without tokens.

        Raises:
            ModelError: An array holds NaN or infinity, or the shapes differ.
        """
        self._batches += 1
        if not np.isfinite(theirs).all():
            reason = f"its output {self._output} holds NaN or infinity in verification batch {self._batches}"
            raise ModelError(str(self._reference), reason, "Repair the float model, or verify no tokens")
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            raise ModelError(
                str(self._converted),
                f"output {self._output} is not finite or has shape {list(ours.shape)} instead of {list(theirs.shape)}",
                "Report this as a bug, with the model and recipe",
            )
        self._noise.add(theirs, ours)
        real = np.ones(ours.shape[:-1], np.bool_) if positions is None else positions >= 0
        self._tokens += int(real.sum())
        if self._output == LOGITS and ours.ndim == 3 and real.shape == ours.shape[:2]:
            divergences, agrees = divergence(theirs[real], ours[real])
            self._kl += float(divergences.sum())
            self._agreeing += int(agrees.sum())
            self._scored += len(agrees)

    def result(self, data: str, max_kl: float | None) -> Verification:
        """The comparison of all batches, held against `max_kl`."""
        kl_mean = self._kl / self._scored if self._scored else None
        return Verification(
            data=data,
            tokens=self._tokens,
            kl_mean=kl_mean,
            top1_agreement=self._agreeing / self._scored if self._scored else None,
            output_snr_db=self._noise.snr_db,
            max_kl=max_kl,
            passed=max_kl is None or (kl_mean is not None and kl_mean <= max_kl),
        )


def compare_layers(
    reference: ir.Model,
    converted: Path,
    batches: Sequence[Batch],
    *,
    provider: Provider,
    threads: int | None = None,
    progress: Progress,
) -> dict[str, float]:
    """Signal-to-noise ratio in dB of each linear layer's output, each model running on its own activations.

    Args:
        reference: The float model as it was before its layers were replaced (equalized: its values v and up are scaled
            like those of the converted model).
        converted: The quantized model, as saved; its layers kept the names of their outputs.
        batches: Feeds; the first is used.
        provider: Where both run.
        threads: Of each session, onnxruntime's choice if None.
        progress: Told of each batch.

    Returns:
        The ratio by layer name.
    """
    model = load_model(converted)
    pairs = [
        LayerPair(layer.name, str(layer.output.name), str(layer.output.name))
        for layer in find_linears(reference).layers
    ]
    return layer_snr(
        reference,
        model,
        pairs,
        batches[:1],
        reference_session=_session_factory(reference, provider, threads),
        other_session=_session_factory(model, provider, threads),
        progress=progress,
    )


def _session_factory(model: ir.Model, provider: Provider, threads: int | None) -> SessionFactory:
    """Makes sessions of parts of a model, with the op library registered if the model needs it."""
    library = str(get_library_path()) if DOMAIN in model.graph.opset_imports else None

    def configure(options: Any) -> None:
        if library is not None:
            options.register_custom_ops_library(library)

    return lambda part: memory_session(part, PROVIDERS[provider], threads=threads, configure=configure)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that is compared after a conversion.

    Attributes:
        source: The float model's file.
        equalized: The float model as it was before its layers were replaced.
        target: The quantized model, as saved.
        batches: Feeds.
        data: What they are, for the report.
        max_kl: Largest acceptable mean KL.
        provider: Where the models run.
        threads: Of each session, onnxruntime's choice if None.
        by_blocks: Run the models block by block, since the float one does not fit in memory.
        progress: Told of the stages.
        stop: Called after each block; may raise.
    """

    source: Path
    equalized: ir.Model
    target: Path
    batches: Sequence[Batch]
    data: str
    max_kl: float | None
    provider: Provider
    threads: int | None
    by_blocks: bool
    progress: Progress
    stop: Callable[[str], None]

    def run(self) -> tuple[Verification, dict[str, float]]:
        """The outputs' comparison, and the signal-to-noise ratio in dB of each layer by name."""
        if self.by_blocks:
            models = (load_model(self.source), self.equalized, load_model(self.target))
            ensure_opset(models[0])
            cuts = self._cuts(*models)
            if isinstance(cuts, str):
                self.progress.note(f"the float model may not fit in memory, and is compared whole all the same: {cuts}")
            else:
                return self._run_by_blocks(models, cuts)
        check = compare_models(
            self.source,
            self.target,
            self.batches,
            data=self.data,
            max_kl=self.max_kl,
            provider=self.provider,
            threads=self.threads,
            progress=self.progress,
        )
        noise = compare_layers(
            self.equalized,
            self.target,
            self.batches,
            provider=self.provider,
            threads=self.threads,
            progress=self.progress,
        )
        return check, noise

    def _cuts(self, original: ir.Model, equalized: ir.Model, converted: ir.Model) -> list[Segmentation] | str:
        """The three models cut at the same values, or why that is impossible."""
        cuts = [find_segments(model, find_linears(model)) for model in (original, equalized)]
        values = {value.name: value for value in (*converted.graph.inputs, *_outputs(converted))}
        missing = [name for name in cuts[1].boundaries if name not in values]
        if missing:
            return f"the quantized model has no value {missing[0]}"
        boundaries = [values[name] for name in cuts[1].boundaries]
        cuts.append(segments_between(converted, boundaries, len([s for s in cuts[1] if s.label.startswith("block")])))
        refused = next((cut.refused for cut in cuts if cut.refused is not None), None)
        return refused or (cuts if len({len(cut) for cut in cuts}) == 1 else "they have different numbers of blocks")

    def _run_by_blocks(
        self, models: tuple[ir.Model, ir.Model, ir.Model], cuts: Sequence[Segmentation]
    ) -> tuple[Verification, dict[str, float]]:
        output = str(models[0].graph.outputs[0].name)
        inputs = describe_inputs(models[0])
        original, equalized, converted = (
            Walk(
                model,
                cut,
                describe_inputs(model),
                batches,
                States(None, ""),
                leading_tokens=0,
                session_factory=_session_factory(model, self.provider, self.threads),
                last=len(cut) - 1,
            )
            for model, cut, batches in zip(models, cuts, (self.batches, self.batches[:1], self.batches), strict=True)
        )
        kept = {value.name for value in _outputs(models[2])}
        layers = [layer for layer in find_linears(models[1]).layers if layer.output.name in kept]
        meter, noise = OutputMeter(output, self.source, self.target), {layer.name: NoiseMeter() for layer in layers}
        with self.progress.stage("Verifying block by block", len(cuts[0])) as advance:
            for index, segment in enumerate(cuts[0]):
                here = {layer.name: str(layer.output.name) for layer in layers if cuts[1].of(layer) == index}
                final = [output] if any(value.name == output for value in _made(segment)) else []
                exact = equalized.expose(cuts[1].segments[index], list(here.values()))
                ours = converted.expose(cuts[2].segments[index], [*here.values(), *final])
                theirs = original.expose(segment, final)
                for batch, of_exact, of_ours, of_theirs in itertools.zip_longest(self.batches, exact, ours, theirs):
                    for name, value in here.items() if of_exact else ():
                        noise[name].add(of_exact[value], of_ours[value])
                    if final:
                        feeds = inputs.complete(batch, "verification batch")
                        meter.add(of_theirs[output], of_ours[output], inputs.token_positions(feeds))
                for walk in (original, equalized, converted):
                    walk.done(segment)
                advance(1)
                self.stop(f"verifying, {segment.label}")
        return meter.result(self.data, self.max_kl), {name: found.snr_db for name, found in noise.items()}


def _outputs(model: ir.Model) -> Iterator[ir.Value]:
    return (value for node in model.graph for value in node.outputs)


def _made(segment: Segment) -> Iterator[ir.Value]:
    return (value for node in segment.nodes for value in node.outputs)
