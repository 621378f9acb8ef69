"""One recipe applied to one model, ready to have any of its layers quantized: the steps of `convert`, kept apart."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import onnx_ir as ir

from fptq_onnx.analysis.chain import Chain, OpenSession
from fptq_onnx.analysis.segments import Link, cut
from fptq_onnx.analysis.store import Store, digest
from fptq_onnx.calibration.calibration import Calibration
from fptq_onnx.errors import WorkDirError
from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.graph.segments import Segmentation, find_segments
from fptq_onnx.planning import GroupDecision, decide_groups, make_plan, observed_groups, step_errors
from fptq_onnx.progress import Progress, SilentProgress
from fptq_onnx.quantization.fallback import keep_float
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.int8 import Int8Weight
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.quantizing import equalize, quantize_layers
from fptq_onnx.recipe import Recipe
from fptq_onnx.rewriting import rewrite
from fptq_onnx.storage.work_dir import WorkDir

__all__ = ["Planned", "StoredCalibration", "Subject", "WeightCache", "materialize", "plan_model"]

Weight = QuantizedWeight | Int8Weight


class StoredCalibration(Calibration):
    """A calibration whose statistics and samples are stored, so that another process, or a later one, need not run it.

    Attributes:
        store: Where they lie.
        context: What the observed model is; must change whenever the same value names mean other values.
    """

    store: Store
    context: tuple[object, ...] = ()

    def observe(
        self, model: ir.Model, segments: Segmentation, activations: Mapping[str, int]
    ) -> dict[str, ActivationStatistics]:
        """Statistics of activations by name, and `samples` if the recipe needs them, from the store if it has them."""
        sampled = self._recipe.needs_samples
        key = f"{'sampled' if sampled else 'statistics'}-{digest(self.context, list(activations))}"
        stored = self.store.load_arrays(key)
        if stored is None:
            observed = super().observe(model, segments, activations)
            stored = {
                f"{index}.{part}": array
                for index, name in enumerate(activations)
                for part, array in observed[name].to_dict().items()
            }
            if sampled:
                stored |= {f"{index}.sample": self.samples[name] for index, name in enumerate(activations)}
            self.store.save_arrays(key, stored)
        if sampled:
            self.samples |= {name: stored[f"{index}.sample"] for index, name in enumerate(activations)}
        parts = ("channel_min", "channel_max", "token_absmax", "histogram", "tokens")
        return {
            name: ActivationStatistics.from_dict({part: stored[f"{index}.{part}"] for part in parts})
            for index, name in enumerate(activations)
        }


class WeightCache:
    """Quantized weights by content: thresholds change few of them, so most are quantized once for a whole study.

    Args:
        limit: Bytes of integers to keep.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        """Start empty."""
        self._limit, self._bytes = limit, 0
        self._kept: dict[str, Weight] = {}

    def get(self, settings: str, layer: LinearLayer, entry: LayerPlan, quantize: Callable[[], Weight]) -> Weight:
        """The weight of a layer as it is now, quantized under `settings` and its plan."""
        content = hashlib.blake2b(layer.weight_array().tobytes(), digest_size=16).hexdigest()
        key = digest(content, settings, entry.weight_method, entry.group_size)
        if key not in self._kept:
            self._kept[key] = weight = quantize()
            self._bytes += weight.q.nbytes
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.pop(next(iter(self._kept))).q.nbytes
        return self._kept[key]


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """The decisions of a recipe, without anything carried out."""

    plan: Plan
    decisions: list[GroupDecision]
    statistics: dict[str, ActivationStatistics]

    @property
    def signature(self) -> tuple[tuple[str, str], ...]:
        """Scheme and equalization of every layer: two threshold pairs with one signature are one model."""
        return tuple(
            (str(layer.scheme), f"{layer.equalization}{' shifted' if layer.shift else ''}")
            for layer in self.plan.layers
        )


def plan_model(model: ir.Model, recipe: Recipe, calibration: StoredCalibration, context: tuple[object, ...]) -> Planned:
    """Observe what the recipe needs and decide, as `convert` does up to its plan."""
    linears = find_linears(model)
    groups = observed_groups(group_by_activation(linears.layers), recipe)
    segments = find_segments(model, linears)
    calibration.context = context
    places = {str(group.activation.name): segments.of(group.layers[0]) for group in groups}
    statistics = calibration.observe(model, segments, places)
    decisions = decide_groups(groups, statistics, recipe, samples=calibration.samples, linears=linears)
    plan = make_plan(linears.layers, decisions, recipe)
    if recipe.fallback.float_layers:
        plan = keep_float(plan, step_errors(decisions, calibration.samples, recipe), recipe.fallback.float_layers)
    return Planned(plan, decisions, statistics)


class Subject:
    """A float model, equalized as its plan says and cut into segments, with the quantization of every layer.

    Args:
        model: The float model, rotated if the recipe rotates; equalized in place.
        planned: Its decisions, on layers of this very model.
        recipe: The recipe they came from.
        calibration: The data.
        context: What the statistics were observed on.
        weights: Shared by all subjects of one model.
        open_session: Makes sessions with the op library registered.
        progress: Told of quantized layers.
    """

    def __init__(
        self,
        model: ir.Model,
        planned: Planned,
        recipe: Recipe,
        calibration: StoredCalibration,
        context: tuple[object, ...],
        weights: WeightCache,
        open_session: OpenSession,
        progress: Progress,
    ) -> None:
        """Equalize, quantize and cut."""
        self.planned, self.recipe = planned, recipe
        self.model = model
        self.applied = equalize(self.model, planned.decisions)
        materialize(self.model)
        self.linears = find_linears(self.model)
        self.layers = self.linears.by_label()
        scales = digest({name: change.key for name, change in self.applied.items()})
        calibration.context = (*context, "equalized", scales)
        choice = recipe.weights.model_dump_json()
        entries = {entry.name: entry for entry in planned.plan.layers}
        methods = [(entry.name, entry.weight_method, entry.group_size) for entry in planned.plan.layers]
        key = digest(calibration.context, choice, methods, recipe.activations.static_range)
        # Second moments take a pass over the data, whose results are kept; plain rounding is as fast as reading them.
        with _work_of(calibration, key) if recipe.weights.needs_moments else nullcontext():
            made = quantize_layers(
                self.model,
                find_segments(self.model, self.linears),
                planned.decisions,
                entries,
                planned.statistics,
                self.applied,
                recipe,
                calibration,
                progress
                if recipe.weights.needs_moments
                else SilentProgress(),  # a line per studied recipe says nothing
                reuse=partial(weights.get, choice),
            )
        self.quantization = made.layers
        self.chain = Chain(cut(self.model, self.linears), self._patch, open_session)

    def names(self, labels: tuple[str, ...] | None) -> frozenset[str]:
        """Node names of layers by label, None for all that the plan quantizes; float ones in the plan are left out."""
        chosen = self.layers if labels is None else labels
        return frozenset(self.layers[label].name for label in chosen) & self.quantization.keys()

    def entry(self, label: str) -> LayerPlan:
        """The plan of a layer."""
        return self.planned.plan[label]

    def weight(self, label: str) -> Weight | None:
        """The quantized weight of a layer, None where the recipe keeps weights float."""
        compute = self.quantization[self.layers[label].name].weight
        return None if compute is None else compute()

    def segment_of(self, label: str) -> Link:
        """The segment that holds a layer."""
        name = self.layers[label].name
        return next(segment for segment in self.chain.segments if name in segment.layers)

    def _patch(self, model: ir.Model, names: frozenset[str]) -> None:
        rewrite(model, {name: self.quantization[name] for name in names}, "custom")


@contextmanager
def _work_of(calibration: StoredCalibration, key: str) -> Iterator[None]:
    """Let a calibration keep its blocks in a directory of this key; processes that want the same one take turns."""
    while calibration.work is None:
        try:
            calibration.work = WorkDir(calibration.store.folder / f"blocks-{key}", {"key": key})
        except WorkDirError as error:
            if "another process" not in error.reason:
                raise
            time.sleep(0.5)
    try:
        yield
    finally:
        calibration.work.close()  # what was stored can still be read
        calibration.work = None


def materialize(model: ir.Model) -> None:
    """Compute the lazy initializers once: an analysis reads each weight many times."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):
            tensor = value.const_value
            value.const_value = ir.Tensor(np.ascontiguousarray(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
