"""The report as one self-contained HTML page: nothing is fetched, figures are inline SVG, light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.analysis import figures
from fptq_onnx.analysis.experiments import Experiment
from fptq_onnx.analysis.figures import ActivationView, Drawing
from fptq_onnx.analysis.inspection import encode
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.result import Analysis, StudyPoint
from fptq_onnx.analysis.subject import Subject
from fptq_onnx.quantization.metrics import snr_db

__all__ = ["draw", "render", "write_page"]

Array = npt.NDArray[Any]

_TEMPLATES = Path(__file__).parent / "templates"
_HISTOGRAMS = 4
# What an activation is called by the role of a layer that reads it.
_KINDS = {
    "attention input": ("q", "k", "v", "qkv", "kv"),
    "attention output": ("o",),
    "feed-forward input": ("gate", "up", "gate_up", "fc1"),
    "feed-forward inner": ("down", "fc2"),
}


def write_page(
    path: Path, analysis: Analysis, laboratory: Laboratory, grid: Mapping[tuple[float, float], StudyPoint]
) -> None:
    """Draw the figures and write the page.

    Args:
        path: The HTML file.
        analysis: What to show.
        laboratory: Gives activations of the layers to draw.
        grid: Points of the threshold study by (v0, v1).
    """
    path.write_text(render(analysis, draw(analysis, laboratory, grid)), encoding="utf-8")


def draw(
    analysis: Analysis, laboratory: Laboratory, grid: Mapping[tuple[float, float], StudyPoint]
) -> dict[str, list[Drawing]]:
    """The figures for what was measured, by section of the page."""
    unit = str(analysis.metric["loss_unit"])
    drawn: dict[str, list[Drawing]] = defaultdict(list)
    if any(layer.metric_loss is not None for layer in analysis.sensitivity):
        drawn["sensitivity"].append(figures.ranking_bars(analysis.sensitivity, unit))
    if any(group.kind == "block" for group in analysis.groups):
        drawn["sensitivity"].append(figures.group_bars(analysis.groups, unit))
    if analysis.sensitivity:
        subject = laboratory.subject(Experiment())
        drawn["activations"] += [figures.activation_histogram(view) for view in _views(analysis, laboratory, subject)]
        maxima = _maxima(subject)
        if maxima:
            drawn["activations"].append(figures.channel_heatmap(maxima))
    if grid:
        activations = laboratory.request.recipe.activations
        drawn["study"].append(figures.threshold_map(grid, (activations.v0, activations.v1), unit))
    if len(analysis.thresholds) > 1:
        drawn["study"].append(figures.front(analysis.thresholds, _chosen(analysis), unit))
    return dict(drawn)


def render(analysis: Analysis, drawings: Mapping[str, list[Drawing]]) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    return environment.get_template("report.html").render(
        a=analysis, drawings=drawings, name=Path(analysis.model).name, folder=Path(analysis.model).parent.name
    )


def _figure(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits; a dash where there is none."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "\u2013"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _chosen(analysis: Analysis) -> int:
    """Index of the proposal among the points."""
    kept = tuple(analysis.proposal.get("kept_float", ()))
    changes = analysis.proposal.get("changes", {})
    for index, point in enumerate(analysis.thresholds):
        if point.changes == changes and point.kept_float == kept:
            return index
    return 0


def _views(analysis: Analysis, laboratory: Laboratory, subject: Subject) -> list[ActivationView]:
    """The activations of the worst layers, each once."""
    views: list[ActivationView] = []
    seen = set()
    for layer in analysis.sensitivity:
        activation = subject.layers[layer.name].activation
        if activation in seen or len(views) == _HISTOGRAMS:
            continue
        seen.add(activation)
        name = str(activation.name)
        found = subject.chain.observe(laboratory.batches[0], subject.segment_of(layer.name), [name])
        values = found[name].reshape(-1, subject.layers[layer.name].k).astype(np.float32)
        encoded = encode(values, subject.quantization[layer.node].activation)
        views.append(
            ActivationView(
                layer.name, values, encoded.codes, encoded.limit, layer.scheme, snr_db(values, encoded.restored)
            )
        )
    return views


def _maxima(subject: Subject) -> dict[str, list[Array]]:
    """Channel maxima in calibration, before equalization, by kind of activation and in the order of the blocks."""
    found: dict[str, dict[int, Array]] = {kind: {} for kind in _KINDS}
    for entry in subject.planned.plan.layers:
        statistics = subject.planned.statistics.get(entry.activation)
        if entry.block is None or statistics is None:
            continue
        for kind, roles in _KINDS.items():
            if entry.role in roles:
                found[kind].setdefault(entry.block, statistics.channel_absmax)
    return {kind: list(rows.values()) for kind, rows in found.items() if rows}
