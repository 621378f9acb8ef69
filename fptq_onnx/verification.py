"""Runs a converted model again and compares it with its float original: as a whole, and layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.errors import ModelError
from fptq_onnx.evaluation.compare import LayerPair, NoiseMeter, layer_snr
from fptq_onnx.evaluation.perplexity import divergence
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.ops import DOMAIN, get_library_path
from fptq_onnx.progress import Progress
from fptq_onnx.report import Verification
from fptq_onnx.runtime import PROVIDERS, Provider, session

__all__ = ["compare_layers", "compare_models"]

logger = logging.getLogger(__name__)

Batch = Mapping[str, npt.NDArray[Any]]

LOGITS = "logits"


def compare_models(
    reference: Path,
    converted: Path,
    batches: Sequence[Batch],
    *,
    data: str,
    max_kl: float | None,
    provider: Provider,
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
        progress: Told of each batch.

    Raises:
        ModelError: A model cannot be opened, or the converted one gives NaN, infinity or another shape.
    """
    models = (load_model(reference), load_model(converted))
    # The converted model is opened as its users open it; the other may be a link, or have names that are not unique.
    sessions = [
        memory_session(models[0], PROVIDERS[provider]),
        session(converted, provider, register_library=DOMAIN in models[1].graph.opset_imports),
    ]
    output = str(models[0].graph.outputs[0].name)
    meter, kl, agreeing, tokens, scored = NoiseMeter(), 0.0, 0, 0, 0
    inputs = [describe_inputs(model) for model in models]
    with progress.stage("Verifying", len(batches)) as advance:
        for index, batch in enumerate(batches, start=1):
            feeds = [spec.complete(batch, f"verification batch {index}") for spec in inputs]
            try:
                theirs, ours = (opened.run([output], fed)[0] for opened, fed in zip(sessions, feeds, strict=True))
            except Exception as error:  # onnxruntime's exceptions share no base class
                reason = f"verification batch {index} cannot be run: {error}"
                raise ModelError(str(reference), reason, "Check the model and the data in onnxruntime") from error
            if not np.isfinite(theirs).all():
                reason = f"its output {output} holds NaN or infinity in verification batch {index}"
                raise ModelError(str(reference), reason, "Repair the float model, or verify no tokens")
            if ours.shape != theirs.shape or not np.isfinite(ours).all():
                raise ModelError(
                    str(converted),
                    f"output {output} is not finite or has shape {list(ours.shape)} instead of {list(theirs.shape)}",
                    "Report this as a bug, with the model and recipe",
                )
            meter.add(theirs, ours)
            positions = inputs[0].token_positions(feeds[0])
            real = np.ones(ours.shape[:-1], np.bool_) if positions is None else positions >= 0
            tokens += int(real.sum())
            if output == LOGITS and ours.ndim == 3 and real.shape == ours.shape[:2]:
                divergences, agrees = divergence(theirs[real], ours[real])
                kl += float(divergences.sum())
                agreeing += int(agrees.sum())
                scored += len(agrees)
            advance(1)
    kl_mean = kl / scored if scored else None
    return Verification(
        data=data,
        tokens=tokens,
        kl_mean=kl_mean,
        top1_agreement=agreeing / scored if scored else None,
        output_snr_db=meter.snr_db,
        max_kl=max_kl,
        passed=max_kl is None or (kl_mean is not None and kl_mean <= max_kl),
    )


def compare_layers(
    reference: ir.Model,
    converted: Path,
    batches: Sequence[Batch],
    *,
    provider: Provider,
    progress: Progress,
) -> dict[str, float]:
    """Signal-to-noise ratio in dB of each linear layer's output, each model running on its own activations.

    Args:
        reference: The float model as it was before its layers were replaced (equalized: its values v and up are scaled
            like those of the converted model).
        converted: The quantized model, as saved; its layers kept the names of their outputs.
        batches: Feeds; the first is used.
        provider: Where both run.
        progress: Told of each batch.

    Returns:
        The ratio by layer name.
    """
    model = load_model(converted)
    pairs = [
        LayerPair(layer.name, str(layer.output.name), str(layer.output.name))
        for layer in find_linears(reference).layers
    ]

    def with_library(copy: ir.Model) -> Any:
        if DOMAIN not in model.graph.opset_imports:
            return memory_session(copy, PROVIDERS[provider])
        library = str(get_library_path())
        return memory_session(
            copy, PROVIDERS[provider], configure=lambda options: options.register_custom_ops_library(library)
        )

    return layer_snr(
        reference,
        model,
        pairs,
        batches[:1],
        reference_session=lambda copy: memory_session(copy, PROVIDERS[provider]),
        other_session=with_library,
        progress=progress,
    )
