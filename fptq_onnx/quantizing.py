"""Carries decisions out: equalizes the float model and computes the constants of every quantized layer."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.calibration import Calibration
from fptq_onnx.calibration.moments import FirstTokenObserver, SecondMomentObserver, SplitMoments, passes_within
from fptq_onnx.calibration.observers import Observer
from fptq_onnx.calibration.walk import Walk, weights_in_memory
from fptq_onnx.errors import ModelError
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.graph.segments import Segment, Segmentation
from fptq_onnx.passes.apply_equalization import AppliedEqualization, ApplyEqualizationPass
from fptq_onnx.passes.replace_linears import (
    ActivationQuantizer,
    LayerQuantization,
    PerTokenQuantizer,
    StaticQuantizer,
)
from fptq_onnx.passes.rotate_heads import RotateHeadsPass
from fptq_onnx.passes.rotate_residual import RotateResidualPass
from fptq_onnx.planning import GroupDecision
from fptq_onnx.progress import Progress
from fptq_onnx.quantization.int4 import QuantizedWeight, quantize_weight
from fptq_onnx.quantization.int8 import Int8Weight, quantize_int8
from fptq_onnx.quantization.plan import LayerPlan
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.quantization.refine import refine
from fptq_onnx.quantization.search import search_range
from fptq_onnx.quantization.static_range import RangeMethod, activation_qparams, static_bounds
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe
from fptq_onnx.storage.weights import StoredWeights

__all__ = ["QuantizedLayers", "ReuseWeight", "equalize", "quantize_layers", "rotate"]

logger = logging.getLogger(__name__)

ReuseWeight = Callable[
    [LinearLayer, LayerPlan, Callable[[], QuantizedWeight | Int8Weight]], QuantizedWeight | Int8Weight
]

_SHIFT = "also.shift:"
_SEARCHED_RANGES: tuple[RangeMethod, ...] = ("absmax", "mse")


def rotate(model: ir.Model, settings: Recipe) -> dict[str, str]:
    """Apply the rotations of the recipe to the float model in place.

    Returns:
        For each one that was asked for, by field name, what was done or why it was refused.
    """
    passes: dict[str, tuple[bool, RotateHeadsPass | RotateResidualPass]] = {
        "heads": (settings.rotation.heads, RotateHeadsPass(settings.calibration.seed)),
        "residual": (settings.rotation.residual, RotateResidualPass(settings.calibration.seed)),
    }
    outcome = {}
    for name, (wanted, rotation) in passes.items():
        if wanted:
            rotation(model)
            outcome[name] = "applied" if rotation.refused is None else f"refused: {rotation.refused}"
            if rotation.refused is not None:
                logger.warning("rotation of the %s refused: %s", name, rotation.refused)
    return outcome


def equalize(model: ir.Model, decisions: Sequence[GroupDecision]) -> dict[str, AppliedEqualization]:
    """Apply the shifts and scales of `decisions` to the float model in place; what went where, by activation."""
    scales = {d.name: d.decision.equalization_scale for d in decisions if d.decision.equalization_scale is not None}
    shifts = {d.name: d.decision.shift for d in decisions if d.decision.shift is not None}
    equalization = ApplyEqualizationPass(scales, shifts)
    equalization(model)
    return equalization.applied


def _changed(
    statistics: Mapping[str, ActivationStatistics], applied: Mapping[str, AppliedEqualization]
) -> dict[str, ActivationStatistics]:
    """Statistics of (X - z) / s by the name of X; the extremes follow from those of X, histogram and tokens are X's."""
    changed = {
        name: dataclasses.replace(
            statistics[name],
            channel_min=change.smooth(statistics[name].channel_min),
            channel_max=change.smooth(statistics[name].channel_max),
        )
        for name, change in applied.items()
    }
    return {**statistics, **changed}


def _bounds(
    decided: GroupDecision, seen: ActivationStatistics, sample: npt.NDArray[np.float32] | None, settings: Recipe
) -> tuple[float, float]:
    """Static range of what is quantized of an activation X.

    Args:
        decided: The activation and its layers, whose weights are still float.
        seen: Statistics of (X - z) / s.
        sample: Tokens of X.
        settings: The recipe.
    """
    choice = settings.activations
    low, high = float(seen.channel_min.min(initial=0)), float(seen.channel_max.max(initial=0))
    if choice.static_range != "output":
        return static_bounds(low, high, seen.histogram, choice.static_range, choice.percentile)
    assert sample is not None
    candidates: dict[str, tuple[float, float]] = {
        method: static_bounds(low, high, seen.histogram, method) for method in _SEARCHED_RANGES
    }
    best = search_range(
        decided.decision.smooth(sample),
        (layer.weight_array() for layer in decided.group.layers),
        candidates,
        symmetric=choice.symmetric,
        token_cap=settings.weights.token_cap,
    )
    return candidates[best]


def _quantizer(
    scheme: Scheme, bounds: tuple[float, float] | None, dtype: npt.DTypeLike, settings: Recipe
) -> ActivationQuantizer:
    if bounds is None or not scheme.is_static:
        return PerTokenQuantizer()
    choice = settings.activations
    low, high = bounds
    scale, zero_point = activation_qparams(low, high, symmetric=choice.symmetric, dtype=dtype)
    return StaticQuantizer(float(scale), int(zero_point))


def _float_dtype(layer: LinearLayer) -> npt.DTypeLike:
    dtype = layer.activation.dtype or layer.weight.dtype
    assert dtype is not None
    numpy_dtype: npt.DTypeLike = dtype.numpy()
    return numpy_dtype


def _typical(
    statistics: Mapping[str, ActivationStatistics], applied: Mapping[str, AppliedEqualization]
) -> dict[str, float]:
    """Largest magnitude of the median token by activation name, infinity for equalized ones, which need no limits."""
    even = {name for name, change in applied.items() if change.scale is not None}
    return {
        name: math.inf if name in even else float(np.median(found.token_absmax)) for name, found in statistics.items()
    }


def _weight(
    layer: LinearLayer,
    entry: LayerPlan,
    moments: SplitMoments | None,
    settings: Recipe,
    methods: dict[str, tuple[str, str]],
) -> QuantizedWeight | Int8Weight:
    assert entry.weight_method != "float"
    if entry.weight_method == "int8":
        return quantize_int8(layer.weight_array(), _float_dtype(layer))
    weight, block_size, dtype = layer.weight_array(), min(entry.group_size, layer.k), _float_dtype(layer)
    choice = settings.weights
    if choice.rounding == "gptq" and moments is not None:
        judge = moments.held_out if moments.held_out.tokens else moments.fit
        refined = refine(
            weight,
            moments.fit,
            judge,
            block_size,
            entry.weight_method,
            dtype,
            damping=choice.damping,
            order=choice.order,
            max_multiple=choice.scale_max_multiple,
        )
        methods[layer.name] = refined.method, refined.reason
        return refined.weight
    return quantize_weight(
        weight,
        block_size,
        entry.weight_method,
        dtype,
        importance=None if moments is None else np.diag(moments.fit.seen),
        max_multiple=choice.scale_max_multiple,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedLayers:
    """Everything the rewriting pass and the report need.

    Attributes:
        layers: Decisions for the pass, by node name.
        methods: For each refined weight its method and the comparison behind it, by node name.
    """

    layers: dict[str, LayerQuantization]
    methods: dict[str, tuple[str, str]]


def quantize_layers(
    model: ir.Model,
    segments: Segmentation,
    decisions: Sequence[GroupDecision],
    entries: Mapping[str, LayerPlan],
    statistics: Mapping[str, ActivationStatistics],
    applied: Mapping[str, AppliedEqualization],
    settings: Recipe,
    calibration: Calibration,
    progress: Progress,
    *,
    reuse: ReuseWeight = lambda layer, entry, quantize: quantize(),
) -> QuantizedLayers:
    """Quantize the weights segment by segment; the second moments of one segment's inputs are in memory at a time.

    Args:
        model: The equalized float model.
        segments: How it is cut.
        decisions: What happens to each activation.
        entries: The plan by node name.
        statistics: Of the activations before equalization.
        applied: From `equalize`.
        settings: The recipe.
        calibration: Carries the data through the segments that need it, and keeps what is finished.
        progress: Told of each layer.
        reuse: Quantizes a weight that needs no second moments, or returns what the same weight gave before.

    Raises:
        ModelError: A weight cannot be quantized.
        StoppedError: It was asked to stop; finished segments are kept.
    """
    work = _SegmentWork(entries, statistics, applied, settings, calibration, reuse)
    by_segment: dict[int, list[GroupDecision]] = {segment.index: [] for segment in segments}
    for decided in decisions:
        by_segment[segments.of(decided.group.layers[0])].append(decided)
    last = max((index for index, decided in by_segment.items() if work.needs_data(decided)), default=-1)
    walk = calibration.walk(model, segments, "weights", last)
    seen = _changed(statistics, applied)
    methods: dict[str, tuple[str, str]] = {}
    shifts: dict[str, npt.NDArray[Any]] = {}
    stored = StoredWeights(calibration.work)
    count = sum(entries[layer.name].weight_method != "float" for d in decisions for layer in d.group.layers)
    with progress.stage("Quantizing", count) as advance:
        for segment in segments:
            here, record = by_segment[segment.index], f"weights.{segment.index:04d}"
            restored, begun = stored.restore(record), time.monotonic()
            arrays, notes = restored if restored is not None else ({}, {})
            fresh = restored is None and (bool(here) or segment.index <= last)
            if fresh:
                with weights_in_memory(model, segment):
                    weights, arrays, refined = work.do(walk, segment, here, segment.index <= last)
                notes = {"methods": refined, "seconds": round(time.monotonic() - begun, 3)}
                stored.put(record, weights, arrays, notes)
            walk.done(segment)
            if notes:
                calibration.took(segment, "quantize", notes["seconds"])
                methods |= {name: tuple(method) for name, method in notes["methods"].items()}
            shifts |= {key.removeprefix(_SHIFT): array for key, array in arrays.items() if key.startswith(_SHIFT)}
            seen |= _unpack({key: array for key, array in arrays.items() if not key.startswith(_SHIFT)})
            advance(sum(entries[layer.name].weight_method != "float" for d in here for layer in d.group.layers))
            if fresh:
                calibration.stop_if_asked(f"quantizing, {segment.label}")
    layers = {}
    for decided in decisions:
        static = any(entries[layer.name].scheme.is_static for layer in decided.group.layers)
        sample = calibration.samples.get(decided.name)
        bounds = _bounds(decided, seen[decided.name], sample, settings) if static else None
        for layer in decided.group.layers:
            entry = entries[layer.name]
            if entry.is_quantized:
                activation = _quantizer(entry.scheme, bounds, _float_dtype(layer), settings)
                weight = None if entry.weight_method == "float" else partial(stored.get, layer.name)
                layers[layer.name] = LayerQuantization(activation, weight, shifts.get(layer.name))
    return QuantizedLayers(layers, methods)


class _SegmentWork:
    """What is done to one segment at a time."""

    def __init__(
        self,
        entries: Mapping[str, LayerPlan],
        statistics: Mapping[str, ActivationStatistics],
        applied: Mapping[str, AppliedEqualization],
        settings: Recipe,
        calibration: Calibration,
        reuse: ReuseWeight,
    ) -> None:
        self._entries, self._applied, self._settings, self._reuse = entries, applied, settings, reuse
        self._calibration = calibration
        self._typical = _typical(statistics, applied)
        multiple = settings.weights.token_cap
        self._caps = {name: multiple * peak if multiple else math.inf for name, peak in self._typical.items()}

    def needs_data(self, decisions: Sequence[GroupDecision]) -> bool:
        """Whether activations of these groups have to be observed once more."""
        return any(self._needs_moments(d) or self._needs_range(d) for d in decisions)

    def do(
        self, walk: Walk, segment: Segment, decisions: Sequence[GroupDecision], runs: bool
    ) -> tuple[dict[str, QuantizedWeight | Int8Weight], dict[str, npt.NDArray[Any]], dict[str, tuple[str, str]]]:
        """Observe a segment and quantize its weights: they, further arrays and methods, as `StoredWeights` has them."""
        ranges = {d.name: self._calibration.observer(self._value(d)) for d in decisions if self._needs_range(d)}
        channels = {d.name: d.group.k for d in decisions if self._needs_moments(d)}
        passes = list(passes_within(channels, self._calibration.moments_bytes)) or [[]]
        methods: dict[str, tuple[str, str]] = {}
        weights: dict[str, QuantizedWeight | Int8Weight] = {}
        shifts: dict[str, npt.NDArray[Any]] = {}
        for number, names in enumerate(passes):
            moments = {
                d.name: SecondMomentObserver(self._value(d), d.group.k, self._caps[d.name])
                for d in decisions
                if d.name in names
            }
            if runs:
                observers: list[Observer] = [*(ranges.values() if number == 0 else ()), *moments.values()]
                observers += self._first_tokens(moments)
                walk.run(segment, observers, carry=number == 0)
            for decided in decisions:
                if decided.name in moments:
                    found = moments.pop(decided.name).moments
                    self._quantize(decided, found, weights, methods)
                    shifts |= self._bias_shifts(decided, found, weights)
        for decided in decisions:
            if decided.name not in channels:
                self._quantize(decided, None, weights, methods)
        arrays = _pack({name: observer.statistics for name, observer in ranges.items()}) | shifts
        return weights, arrays, methods

    def _first_tokens(self, moments: Mapping[str, SecondMomentObserver]) -> list[FirstTokenObserver]:
        weight = self._settings.weights.first_token_weight
        wanted = moments if self._calibration.emphasizes_first_tokens else ()
        return [FirstTokenObserver(moments[name], weight, self._typical[name]) for name in wanted]

    def _quantize(
        self,
        decided: GroupDecision,
        moments: SplitMoments | None,
        weights: dict[str, QuantizedWeight | Int8Weight],
        methods: dict[str, tuple[str, str]],
    ) -> None:
        """Quantize the weights that read one activation into `weights`."""
        for layer in decided.group.layers:
            entry = self._entries[layer.name]
            if entry.is_quantized and entry.weight_method != "float":
                try:
                    quantize = partial(_weight, layer, entry, moments, self._settings, methods)
                    weights[layer.name] = self._reuse(layer, entry, quantize) if moments is None else quantize()
                except ModelError as error:
                    raise ModelError(f"weight of {entry.label} ({layer.name})", error.reason, error.fix) from error

    def _bias_shifts(
        self, decided: GroupDecision, moments: SplitMoments, weights: Mapping[str, QuantizedWeight | Int8Weight]
    ) -> dict[str, npt.NDArray[Any]]:
        """What rounding the weights moves the mean outputs by, of layers whose bias can make up for it."""
        if not self._settings.weights.bias_correction:
            return {}
        return {
            _SHIFT + layer.name: moments.fit.output_shift(layer.weight_array(), weights[layer.name].dequantize())
            for layer in decided.group.layers
            if layer.bias is not None and layer.name in weights
        }

    def _value(self, decided: GroupDecision) -> str:
        """Name of the activation that the layers read now."""
        return self._applied[decided.name].activation if decided.name in self._applied else decided.name

    def _needs_range(self, decided: GroupDecision) -> bool:
        """The extremes of (X - z) / s follow from those of X; a clip range needs its histogram."""
        return decided.name in self._applied and self._settings.activations.static_range != "absmax"

    def _needs_moments(self, decided: GroupDecision) -> bool:
        methods = {self._entries[layer.name].weight_method for layer in decided.group.layers} - {"float", "int8"}
        return "weighted_clip" in methods or bool(methods and self._settings.weights.needs_moments)


def _pack(statistics: Mapping[str, ActivationStatistics]) -> dict[str, npt.NDArray[Any]]:
    return {
        f"also.{name}/{field}": array for name, found in statistics.items() for field, array in found.to_dict().items()
    }


def _unpack(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, ActivationStatistics]:
    fields: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for key, array in arrays.items():
        name, _, field = key.removeprefix("also.").rpartition("/")
        fields.setdefault(name, {})[field] = array
    return {name: ActivationStatistics.from_dict(found) for name, found in fields.items()}
