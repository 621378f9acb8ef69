"""Thresholds and granularity: a small grid around the recipe, priced and measured, then the best of it combined."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fptq_onnx.analysis.campaign import Campaign
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.result import StudyPoint
from fptq_onnx.analysis.speed import CostModel

__all__ = ["Study", "mark_front", "threshold_grid"]

logger = logging.getLogger(__name__)

V0, V1 = "activations.v0", "activations.v1"
_LOWER = (0.0, 7.5, 15.0, 30.0, 60.0)
# The last stands for "never per token".
_UPPER = (15.0, 50.0, 150.0, 500.0, 1e6)
# A change that is faster may cost this much of the loss; one that is slower has to lower it.
_SAME_LOSS = 1.01
# Kernel times are not steadier than this.
_SAME_TIME = 1.003


def threshold_grid(v0: float, v1: float) -> list[tuple[float, float]]:
    """Pairs around 15 and 150 and around a recipe's own, its own first, then by distance from it."""

    def distance(pair: tuple[float, float]) -> int:
        lower, upper = sorted({*_LOWER, v0}), sorted({*_UPPER, v1})
        return abs(lower.index(pair[0]) - lower.index(v0)) + abs(upper.index(pair[1]) - upper.index(v1))

    pairs = {(a, b) for a, b in itertools.product({*_LOWER, v0}, {*_UPPER, v1}) if a <= b} | {(0.0, 0.0)}
    return [*sorted(pairs - {(0.0, 0.0)}, key=lambda pair: (distance(pair), pair)), (0.0, 0.0)]


def mark_front(points: Sequence[StudyPoint]) -> None:
    """Mark the points that no other beats in both loss and time."""
    for point in points:
        point.on_front = not any(
            other.loss <= point.loss
            and other.seconds_per_batch <= point.seconds_per_batch
            and (other.loss, other.seconds_per_batch) != (point.loss, point.seconds_per_batch)
            for other in points
        )


class Study:
    """Step 4 of the protocol.

    Args:
        campaign: Measures.
        costs: Prices.

    Attributes:
        points: Every recipe that was measured as a whole, that which was asked for first.
        grid: Threshold pair -> index of its point; pairs that decide alike share one.
        best: The most accurate recipe found that is no slower than the one asked for.
    """

    def __init__(self, campaign: Campaign, costs: CostModel) -> None:
        """Start from the recipe that was asked for, which has been measured."""
        self._campaign, self._costs = campaign, costs
        self._lab = campaign.laboratory
        self.points: list[StudyPoint] = []
        self.grid: dict[tuple[float, float], int] = {}
        self._index: dict[Experiment, int] = {}
        self.best = Experiment()
        self._float_seconds = costs.float_seconds(self._lab.subject(Experiment()))

    def start(self, measured: Measurement) -> None:
        """Take the recipe that was asked for as the first point."""
        self._add(Experiment(), measured)

    def thresholds(self, until: float | None) -> None:
        """Measure pairs of thresholds that decide differently."""
        recipe = self._lab.request.recipe
        if recipe.activations.scheme != "policy":
            logger.info("the recipe applies %s everywhere: no thresholds to study", recipe.activations.scheme)
            return
        alike: dict[tuple[tuple[str, str], ...], Experiment] = {}
        chosen: dict[tuple[float, float], Experiment] = {}
        for v0, v1 in threshold_grid(recipe.activations.v0, recipe.activations.v1):
            own = (v0, v1) == (recipe.activations.v0, recipe.activations.v1)
            experiment = Experiment() if own else Experiment.of({V0: v0, V1: v1})
            chosen[v0, v1] = alike.setdefault(self._lab.planned(experiment).signature, experiment)
        # Both ends first: they say what the most static and the most dynamic plan give.
        ends = [chosen[0.0, 0.0], chosen[max(chosen, key=lambda pair: (min(pair), pair))]]
        found = self._campaign.several([*ends, *chosen.values()], "Studying thresholds", until)
        for pair, experiment in chosen.items():
            if experiment in found:
                self.grid[pair] = self._add(experiment, found[experiment])

    def granularity(self, until: float | None) -> None:
        """Measure single changes of grid, group size and ranges; then combine those that pay, thresholds last."""
        limit = self.points[0].seconds_per_batch
        singles = self._single_changes()
        experiments = [Experiment.of(change) for change in singles]
        found = self._campaign.several(experiments, "Studying granularity", until)
        measured = [(change, e) for change, e in zip(singles, experiments, strict=True) if e in found]
        for _, experiment in measured:
            self._add(experiment, found[experiment])
        for change, _ in sorted(measured, key=lambda item: found[item[1]].loss):
            self._try(change, limit, until)
        for _, index in sorted(self.grid.items(), key=lambda item: self.points[item[1]].loss)[:4]:
            point = self.points[index]
            if {V0, V1} & point.changes.keys():
                self._try({V0: point.v0, V1: point.v1}, limit, until)
        mark_front(self.points)

    def point(self, experiment: Experiment) -> StudyPoint:
        """The point of an experiment that was measured here."""
        return self.points[self._index[experiment]]

    def _single_changes(self) -> list[dict[str, Any]]:
        recipe = self._lab.request.recipe
        weights, activations = recipe.weights, recipe.activations
        changes: list[dict[str, Any]] = []
        if weights.format == "int4":
            changes += [{"weights.grid": grid} for grid in ("signed8",) if weights.grid == "absmax7"]
            changes += [{"weights.scales": "integer"}] if weights.scales == "float" else []
            sizes = [size for size in (32, 64, 128) if size != weights.group_size]
            changes += [{"weights.group_size": size} for size in sorted(sizes, reverse=True)]
        if activations.static_range != "mse":
            changes.append({"activations.static_range": "mse"})
        return changes

    def _try(self, change: Mapping[str, Any], limit: float, until: float | None) -> None:
        """Move the best recipe by a change if that pays and stays within the time of the recipe asked for."""
        current = self.point(self.best)
        candidate = Experiment.of(self.best.changes | dict(change))
        if candidate == self.best:
            return
        found = self._campaign.several([candidate], "Combining", until)
        if candidate not in found:
            return
        point = self.points[self._add(candidate, found[candidate])]
        better = point.loss < current.loss and point.seconds_per_batch <= _SAME_TIME * limit
        faster = point.seconds_per_batch < current.seconds_per_batch and point.loss <= _SAME_LOSS * current.loss
        if better or faster:
            self.best = candidate

    def _add(self, experiment: Experiment, measured: Measurement) -> int:
        if experiment not in self._index:
            subject = self._lab.subject(experiment)
            seconds = self._costs.seconds(subject)
            activations = subject.recipe.activations
            point = StudyPoint(
                changes=experiment.changes,
                v0=activations.v0,
                v1=activations.v1,
                loss=measured.loss,
                seconds_per_batch=seconds,
                speedup=self._float_seconds / seconds,
                static_share=subject.planned.plan.static_share,
            )
            self._index[experiment] = len(self.points)
            self.points.append(point)
        return self._index[experiment]

    def with_float(self, experiment: Experiment, kept: tuple[str, ...], measured: Measurement) -> StudyPoint:
        """Add a point of a recipe whose layers `kept` stay float."""
        base = self.point(Experiment.of(experiment.changes))
        seconds = self._costs.seconds(self._lab.subject(experiment), kept)
        point = dataclasses.replace(
            base,
            loss=measured.loss,
            seconds_per_batch=seconds,
            speedup=self._float_seconds / seconds,
            kept_float=kept,
        )
        self.points.append(point)
        mark_front(self.points)
        return point
