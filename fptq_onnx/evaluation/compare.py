"""Layer-by-layer noise between two models, and agreement of the embeddings of two encoders."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.observation import find_value, replace_outputs
from fptq_onnx.calibration.runner import SessionFactory
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import Feeds, ModelInputs, describe_inputs
from fptq_onnx.progress import Progress, SilentProgress

__all__ = [
    "EmbeddingAgreement",
    "LayerPair",
    "NoiseMeter",
    "compare_embeddings",
    "cosine_similarity",
    "embed",
    "expose",
    "layer_snr",
    "spearman",
]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerPair:
    """Two values that should be equal: of the reference model and of the other.

    Attributes:
        label: Key of the result.
        reference: Value name in the reference model, such as a linear layer's output.
        other: Value name in the other model.
    """

    label: str
    reference: str
    other: str


class NoiseMeter:
    """Signal-to-noise ratio of a stream of arrays, summed in float64."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.signal = 0.0
        self.noise = 0.0

    def add(self, reference: Array, other: Array) -> None:
        """Count two arrays of one shape."""
        x = reference.astype(np.float64).ravel()
        error = other.astype(np.float64).ravel() - x
        self.signal += float(x @ x)
        self.noise += float(error @ error)

    @property
    def snr_db(self) -> float:
        """10 log10(sum x^2 / sum (y - x)^2); infinite without noise, -infinite where only noise was seen."""
        if self.noise == 0:
            return float("inf")
        return float(10 * np.log10(self.signal / self.noise)) if self.signal else float("-inf")


def layer_snr(
    reference: ir.Model,
    other: ir.Model,
    pairs: Sequence[LayerPair],
    batches: Iterable[Mapping[str, Array]],
    *,
    pairs_per_run: int = 64,
    reference_session: SessionFactory = memory_session,
    other_session: SessionFactory = memory_session,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Signal-to-noise ratio in dB of each pair over all batches; each model computes on its own activations.

    Memory holds the values of `pairs_per_run` pairs for one batch. Each run stops at the last of its values, so with
    pairs in the models' order splitting them costs about half a pass per split.

    Args:
        reference: The float model; left as it is.
        other: The quantized model; left as it is.
        pairs: What corresponds.
        batches: Feeds, completed from token ids as for calibration. Kept: give few.
        pairs_per_run: Values exposed at once.
        reference_session: Makes sessions of the reference with other outputs.
        other_session: The same for the other model, normally with the op library registered.
        progress: Told of each batch of each run.

    Raises:
        CalibrationError: A value is missing, shapes differ, a value is not finite, or data do not fit.
    """
    models = (reference, other)
    feeds = [
        tuple(describe_inputs(model).complete(batch, f"comparison batch {index}") for model in models)
        for index, batch in enumerate(batches, start=1)
    ]
    if not feeds:
        raise CalibrationError("comparison data", "hold no batch", "Give at least one sequence")
    meters = {pair.label: NoiseMeter() for pair in pairs}
    runs = [pairs[start : start + pairs_per_run] for start in range(0, len(pairs), pairs_per_run)]
    with (progress or SilentProgress()).stage("Comparing layers", len(runs) * len(feeds)) as advance:
        for run in runs:
            names = ([pair.reference for pair in run], [pair.other for pair in run])
            sessions = (reference_session(expose(reference, names[0])), other_session(expose(other, names[1])))
            for index, batch in enumerate(feeds, start=1):
                values = [
                    dict(
                        zip(dict.fromkeys(wanted), _run(session, list(dict.fromkeys(wanted)), fed, index), strict=True)
                    )
                    for session, wanted, fed in zip(sessions, names, batch, strict=True)
                ]
                for pair in run:
                    _add(meters[pair.label], pair, values[0][pair.reference], values[1][pair.other])
                advance(1)
    return {label: meter.snr_db for label, meter in meters.items()}


def expose(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Copy of a model whose outputs are the values of these names; repeated names are exposed once."""
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]}
    replace_outputs(copy, [find_value(values, name) for name in dict.fromkeys(names)])
    return copy


def _run(session: Any, names: list[str], feeds: Feeds, index: int) -> list[Array]:
    try:
        results: list[Array] = session.run(names, feeds)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise CalibrationError(
            f"comparison batch {index}", f"cannot be run: {error}", "Check the data against the model"
        ) from error
    return results


def _add(meter: NoiseMeter, pair: LayerPair, reference: Array, other: Array) -> None:
    if reference.shape != other.shape:
        raise CalibrationError(
            f"layer {pair.label}",
            f"gives {list(reference.shape)} as {pair.reference} and {list(other.shape)} as {pair.other}",
            "Pair values that correspond",
        )
    meter.add(reference, other)
    if not np.isfinite(meter.signal + meter.noise):
        raise CalibrationError(f"layer {pair.label}", "gives NaN or infinity", "Check the layer in float32")


def cosine_similarity(x: Array, y: Array) -> Float64:
    """Cosine of the angle between the rows of x and y [N, D], float64 [N]; 0 where a row is zero."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    products: Float64 = np.einsum("...d,...d->...", x, y)
    return np.where(norms > 0, products / np.where(norms > 0, norms, 1), 0)


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; NaN if one is constant."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def _ranks(x: Array) -> Float64:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Float64 = (last - (counts - 1) / 2.0)[inverse]
    return mean_rank


@dataclass(frozen=True)
class EmbeddingAgreement:
    """How alike two sets of embeddings of the same texts are.

    Attributes:
        cosine_mean: Mean cosine similarity of a text's two embeddings.
        cosine_min: The smallest.
        spearman: Rank correlation of the cosine similarities of all pairs of texts; NaN below three texts.
    """

    cosine_mean: float
    cosine_min: float
    spearman: float


def compare_embeddings(reference: Array, other: Array) -> EmbeddingAgreement:
    """Agreement of two encoders' embeddings [N, D] of the same N texts."""
    if reference.shape != other.shape or reference.ndim != 2 or not len(reference):
        raise CalibrationError(
            "embeddings", f"have shapes {list(reference.shape)} and {list(other.shape)}", "Embed the same texts"
        )
    cosines = cosine_similarity(reference, other)
    first, second = np.array(list(itertools.combinations(range(len(reference)), 2)), np.int64).reshape(-1, 2).T
    similar = [cosine_similarity(x[first], x[second]) for x in (reference, other)]
    rank = spearman(*similar) if len(first) > 1 else float("nan")
    return EmbeddingAgreement(float(cosines.mean()), float(cosines.min()), rank)


def embed(
    session: Any, inputs: ModelInputs, batches: Iterable[Mapping[str, Array]], output: str | None = None
) -> Float64:
    """Embeddings [N, D] of all sequences: the output [B, D], or the mean of an output [B, S, D] over real tokens.

    Args:
        session: onnxruntime session of an encoder.
        inputs: Its inputs.
        batches: Feeds, completed from token ids.
        output: Name of the output, by default the first.

    Raises:
        CalibrationError: Data do not fit the model, or the output has another rank.
    """
    name = output or session.get_outputs()[0].name
    rows: list[Float64] = []
    for index, batch in enumerate(batches, start=1):
        feeds = inputs.complete(batch, f"comparison batch {index}")
        hidden = _run(session, [name], feeds, index)[0].astype(np.float64)
        positions = inputs.token_positions(feeds)
        if hidden.ndim == 3 and positions is not None and positions.shape == hidden.shape[:2]:
            real = (positions >= 0)[:, :, None]
            hidden = (hidden * real).sum(axis=1) / np.maximum(real.sum(axis=1), 1)
        if hidden.ndim != 2:
            raise CalibrationError(
                f"output {name}",
                f"has shape {list(hidden.shape)}",
                "Name an output [batch, size] or [batch, tokens, size]",
            )
        rows.append(hidden)
    if not rows:
        raise CalibrationError("comparison data", "hold no batch", "Give at least one sequence")
    return np.concatenate(rows)
