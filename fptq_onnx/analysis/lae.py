"""Does equalization earn its place: the output error of each equalized layer against what it replaces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fptq_onnx.analysis.evidence import Evidence
from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.quantization.int4 import Grid
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.quantization.search import Candidate, search_scheme

__all__ = ["Equalized", "equalization_not_helping"]

_TOKENS = 256
# Less gain than this does not pay for the change of the weights.
_HELPS = 0.95


@dataclass(frozen=True)
class Equalized:
    """An equalized activation whose layers would be better off otherwise.

    Attributes:
        label: First layer that reads it.
        sentence: Errors with and without, and per token.
        excess: Error with equalization over the best other error.
    """

    label: str
    sentence: str
    excess: float


def equalization_not_helping(evidence: Evidence) -> list[Equalized]:
    """Equalized activations whose output error is no better than static, or far worse than per token; worst first."""
    subject = evidence.subject
    feeds = evidence.campaign.laboratory.batches[0]
    plan = {entry.name: entry for entry in subject.planned.plan.layers}
    found = []
    for group in group_by_activation(subject.linears.layers):
        layers = [layer for layer in group.layers if plan[layer.name].scheme is Scheme.EQUALIZED_STATIC]
        if not layers:
            continue
        entry = plan[layers[0].name]
        applied = subject.applied[entry.activation]
        assert applied.scale is not None
        values = subject.chain.observe(feeds, subject.segment_of(layers[0].label), [str(layers[0].activation.name)])
        # The activation and weights as they were before equalization, for all candidates alike.
        x = applied.undo(next(iter(values.values())).reshape(-1, group.k)[:_TOKENS].astype(np.float32))
        seen = subject.planned.statistics[entry.activation]
        grid: Grid = "signed8"  # stands for weights that are not int4
        if entry.weight_method != "float" and entry.weight_method != "int8":
            grid = entry.weight_method
        search = search_scheme(
            x,
            [(layer.weight_array() / applied.scale[:, None]).astype(np.float32) for layer in layers],
            seen.channel_min,
            seen.channel_max,
            group_size=min(entry.group_size, group.k),
            grid=grid,
            floor=subject.recipe.equalization.floor,
            shift=applied.shift,
        )
        alike = tuple(c for c in search.candidates if (c.shift is not None) == entry.shift)
        with_it = _error(alike, Scheme.EQUALIZED_STATIC, entry.equalization)
        static = _error(search.candidates, Scheme.STATIC, "none")
        dynamic = _error(search.candidates, Scheme.PER_TOKEN, "none")
        if with_it < _HELPS * static and with_it < 2 * dynamic:
            continue
        found.append(
            Equalized(
                layers[0].label,
                f"{layers[0].label} (range {entry.activation_range or 0:.4g}): relative output error {with_it:.3g} "
                f"with {entry.equalization}, {static:.3g} static without, {dynamic:.3g} per token.",
                with_it / max(min(static, dynamic), 1e-30),
            )
        )
    return sorted(found, key=lambda each: -each.excess)


def _error(candidates: tuple[Candidate, ...], scheme: Scheme, equalization: str) -> float:
    return min(c.error for c in candidates if c.scheme is scheme and c.equalization == equalization)
