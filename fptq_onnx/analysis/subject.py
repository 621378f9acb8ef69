"""One recipe applied to one model, ready to have any of its layers quantized: the steps of `convert`, kept apart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common

from fptq_onnx.analysis.chain import Chain, OpenSession
from fptq_onnx.analysis.segments import Segment, cut
from fptq_onnx.analysis.store import Store, digest
from fptq_onnx.calibration.calibration import Calibration
from fptq_onnx.calibration.moments import SplitMoments
from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.replace_linears import LayerQuantization
from fptq_onnx.passes.to_w4a8 import ToW4A8Pass
from fptq_onnx.planning import GroupDecision, decide_groups, make_plan, observed_groups
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.quantizing import equalize, equalized_statistics, input_moments, layer_quantization
from fptq_onnx.recipe import Recipe

__all__ = ["Planned", "StoredCalibration", "Subject", "WeightCache", "materialize", "plan_model"]

Array = npt.NDArray[Any]


class StoredCalibration(Calibration):
    """A calibration whose statistics are stored, so that another process, or the same one later, need not run it.

    `context` names what the observed model is; it must change whenever the same value names mean other values.
    """

    store: Store
    context: tuple[object, ...] = ()

    def observe(self, model: ir.Model, activations: Any) -> dict[str, ActivationStatistics]:
        """Statistics of activations by name, from the store if they are there."""
        names = list(dict.fromkeys(activations))
        key = f"statistics-{digest(self.context, names)}"
        stored = self.store.load_arrays(key)
        if stored is None:
            observed = super().observe(model, names)
            self.store.save_arrays(
                key,
                {
                    f"{index}.{part}": array
                    for index, name in enumerate(names)
                    for part, array in observed[name].to_dict().items()
                },
            )
            return observed
        parts = ("channel_min", "channel_max", "token_absmax", "histogram", "tokens")
        return {
            name: ActivationStatistics.from_dict({part: stored[f"{index}.{part}"] for part in parts})
            for index, name in enumerate(names)
        }


class WeightCache:
    """Quantized weights by content: thresholds change few of them, so most are quantized once for a whole study.

    Args:
        store: Where weights that took second moments to round are kept, None to keep all in memory only.
        limit: Bytes of integers to keep in memory.
    """

    def __init__(self, store: Store, limit: int = 1 << 30) -> None:
        """Start empty."""
        self._store, self._limit, self._bytes = store, limit, 0
        self._kept: dict[str, QuantizedWeight] = {}

    def get(
        self, layer: LinearLayer, settings: tuple[object, ...], expensive: bool, quantize: Callable[[], QuantizedWeight]
    ) -> QuantizedWeight:
        """The weight of a layer as it is now, quantized under `settings`."""
        content = hashlib.blake2b(layer.weight_array().tobytes(), digest_size=16).hexdigest()
        key = f"weight-{digest(content, settings)}"
        if key not in self._kept:
            stored = self._store.load_arrays(key) if expensive else None
            weight = quantize() if stored is None else _weight_of(stored)
            if expensive and stored is None:
                self._store.save_arrays(key, _arrays_of(weight))
            self._kept[key] = weight
            self._bytes += weight.q.nbytes
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.pop(next(iter(self._kept))).q.nbytes
        return self._kept[key]


def _arrays_of(weight: QuantizedWeight) -> dict[str, Array]:
    scale = weight.scale
    bits = scale.view(np.uint16) if scale.dtype == ml_dtypes.bfloat16 else scale  # .npz knows no bfloat16
    return {
        "q": weight.q,
        "scale": bits,
        "numbers": np.array([weight.block_size, weight.scale_max_multiple, scale.dtype == ml_dtypes.bfloat16]),
    }


def _weight_of(arrays: Mapping[str, Array]) -> QuantizedWeight:
    block_size, multiple, bfloat16 = (int(number) for number in arrays["numbers"])
    scale = arrays["scale"].view(ml_dtypes.bfloat16) if bfloat16 else arrays["scale"]
    return QuantizedWeight(arrays["q"], scale, block_size, multiple)


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """The decisions of a recipe, without anything carried out."""

    plan: Plan
    decisions: list[GroupDecision]
    statistics: dict[str, ActivationStatistics]

    @property
    def signature(self) -> tuple[tuple[str, str], ...]:
        """Scheme and equalization of every layer: two threshold pairs with one signature are one model."""
        return tuple((str(layer.scheme), layer.equalization) for layer in self.plan.layers)


def plan_model(model: ir.Model, recipe: Recipe, calibration: StoredCalibration, context: tuple[object, ...]) -> Planned:
    """Observe what the recipe needs and decide, as `convert` does up to its plan."""
    linears = find_linears(model)
    groups = observed_groups(group_by_activation(linears.layers), recipe)
    calibration.context = context
    statistics = calibration.observe(model, [str(group.activation.name) for group in groups])
    decisions = decide_groups(groups, statistics, recipe)
    return Planned(make_plan(linears.layers, decisions, recipe), decisions, statistics)


class Subject:
    """A float model, equalized as its plan says and cut into segments, with the quantization of every layer.

    Args:
        model: The float model, rotated if the recipe rotates; left as it is.
        planned: Its decisions.
        recipe: The recipe they came from.
        calibration: The data.
        context: What the statistics were observed on.
        weights: Shared by all subjects of one model.
        open_session: Makes sessions with the op library registered.
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
    ) -> None:
        """Equalize and cut; weights are quantized when a measurement reads them."""
        self.planned, self.recipe = planned, recipe
        self.model = model.clone()
        self.applied = equalize(self.model, planned.decisions)
        materialize(self.model)
        scales = {name: scale.scale.tobytes().hex() for name, scale in self.applied.items()}
        calibration.context = (*context, "equalized", digest(scales))
        self.statistics = equalized_statistics(self.model, planned.statistics, self.applied, recipe, calibration)
        entries = {entry.name: entry for entry in planned.plan.layers}
        moments = _LazyMoments(
            lambda: input_moments(
                self.model, planned.decisions, entries, self.statistics, self.applied, recipe, calibration
            )
        )
        made = layer_quantization(planned.decisions, entries, self.statistics, moments, recipe, {})
        self.quantization = {
            name: self._cached(quantization, entries[name], weights, calibration.context)
            for name, quantization in made.items()
        }
        self.linears = find_linears(self.model)
        self.layers = self.linears.by_label()
        self.chain = Chain(cut(self.model, self.linears), self._patch, open_session)

    def names(self, labels: tuple[str, ...] | None) -> frozenset[str]:
        """Node names of layers by label, None for all that the plan quantizes; float ones in the plan are left out."""
        chosen = self.layers if labels is None else labels
        return frozenset(self.layers[label].name for label in chosen) & self.quantization.keys()

    def entry(self, label: str) -> LayerPlan:
        """The plan of a layer."""
        return self.planned.plan[label]

    def weight(self, label: str) -> QuantizedWeight | None:
        """The quantized weight of a layer, None where the recipe keeps weights float."""
        layer = self.layers[label]
        compute = self.quantization[layer.name].weight
        return None if compute is None else compute(layer)

    def segment_of(self, label: str) -> Segment:
        """The segment that holds a layer."""
        name = self.layers[label].name
        return next(segment for segment in self.chain.segments if name in segment.layers)

    def _cached(
        self,
        quantization: LayerQuantization,
        entry: LayerPlan,
        weights: WeightCache,
        context: tuple[object, ...],
    ) -> LayerQuantization:
        compute = quantization.weight
        if compute is None:
            return quantization
        choice = self.recipe.weights
        settings: tuple[object, ...] = (entry.weight_method, entry.group_size, choice.model_dump(mode="json"))
        if choice.needs_moments:
            settings = (*settings, context)

        def cached(layer: LinearLayer) -> QuantizedWeight:
            return weights.get(layer, settings, choice.needs_moments, lambda: compute(layer))

        return dataclasses.replace(quantization, weight=cached)

    def _patch(self, model: ir.Model, names: frozenset[str]) -> None:
        ToW4A8Pass({name: self.quantization[name] for name in names})(model)
        AddFunctionsPass()(model)
        onnx_ir.passes.common.RemoveUnusedNodesPass()(model)  # the float weights


class _LazyMoments(Mapping[str, SplitMoments]):
    """Second moments that are observed when the first weight asks; none are if every weight is in the cache."""

    def __init__(self, observe: Callable[[], dict[str, SplitMoments]]) -> None:
        self._observe = observe
        self._found: dict[str, SplitMoments] | None = None

    @property
    def _moments(self) -> dict[str, SplitMoments]:
        if self._found is None:
            self._found = self._observe()
        return self._found

    def __getitem__(self, name: str) -> SplitMoments:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def materialize(model: ir.Model) -> None:
    """Compute the lazy initializers once: an analysis reads each weight many times."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):
            tensor = value.const_value
            value.const_value = ir.Tensor(np.ascontiguousarray(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
