"""Carries decisions out: equalizes the float model and computes the constants of every quantized layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.passes.apply_equalization import AppliedScale, ApplyEqualizationPass
from fptq_onnx.passes.replace_linears import (
    ActivationQuantizer,
    LayerQuantization,
    PerTokenQuantizer,
    StaticQuantizer,
)
from fptq_onnx.planning import GroupDecision
from fptq_onnx.quantization.int4 import QuantizedWeight, quantize_weight
from fptq_onnx.quantization.plan import LayerPlan
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.quantization.static_range import activation_qparams, static_bounds
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe

__all__ = ["Observe", "equalize", "equalized_statistics", "layer_quantization"]

Observe = Callable[[ir.Model, Sequence[str]], dict[str, ActivationStatistics]]


def equalize(model: ir.Model, decisions: Sequence[GroupDecision]) -> dict[str, AppliedScale]:
    """Apply the equalization scales of `decisions` to the float model in place; what went where, by activation."""
    scales = {d.name: d.decision.equalization_scale for d in decisions if d.decision.equalization_scale is not None}
    equalization = ApplyEqualizationPass(scales)
    equalization(model)
    return equalization.applied


def equalized_statistics(
    model: ir.Model,
    statistics: Mapping[str, ActivationStatistics],
    applied: Mapping[str, AppliedScale],
    settings: Recipe,
    observe: Observe,
) -> dict[str, ActivationStatistics]:
    """Statistics of X / s by the name of X: exact from those of X, unless the range needs the new histogram."""
    if settings.activations.static_range != "absmax" and applied:
        fresh = observe(model, [scale.activation for scale in applied.values()])
        return {**statistics, **{name: fresh[scale.activation] for name, scale in applied.items()}}
    divided = {
        name: dataclasses.replace(
            statistics[name],
            channel_min=statistics[name].channel_min / scale.scale,
            channel_max=statistics[name].channel_max / scale.scale,
        )
        for name, scale in applied.items()
    }
    return {**statistics, **divided}


def _quantizer(
    scheme: Scheme, seen: ActivationStatistics, dtype: npt.DTypeLike, settings: Recipe
) -> ActivationQuantizer:
    if scheme is Scheme.PER_TOKEN:
        return PerTokenQuantizer()
    choice = settings.activations
    low, high = static_bounds(
        float(seen.channel_min.min(initial=0)),
        float(seen.channel_max.max(initial=0)),
        seen.histogram,
        choice.static_range,
        choice.percentile,
    )
    scale, zero_point = activation_qparams(low, high, symmetric=choice.symmetric, dtype=dtype)
    return StaticQuantizer(float(scale), int(zero_point))


def _float_dtype(layer: LinearLayer) -> npt.DTypeLike:
    dtype = layer.activation.dtype or layer.weight.dtype
    assert dtype is not None
    numpy_dtype: npt.DTypeLike = dtype.numpy()
    return numpy_dtype


def _weight(layer: LinearLayer, entry: LayerPlan, settings: Recipe) -> QuantizedWeight:
    assert entry.weight_method != "float"
    return quantize_weight(
        layer.weight_array(),
        min(entry.group_size, layer.k),
        entry.weight_method,
        _float_dtype(layer),
        max_multiple=settings.weights.scale_max_multiple,
    )


def layer_quantization(
    decisions: Sequence[GroupDecision],
    entries: Mapping[str, LayerPlan],
    statistics: Mapping[str, ActivationStatistics],
    settings: Recipe,
) -> dict[str, LayerQuantization]:
    """What the rewriting pass needs, by node name; weights are quantized when the pass reaches them."""
    quantization = {}
    for decided in decisions:
        for layer in decided.group.layers:
            entry = entries[layer.name]
            if not entry.is_quantized:
                continue

            def weight(current: LinearLayer, entry: LayerPlan = entry) -> QuantizedWeight:
                return _weight(current, entry, settings)

            activation = _quantizer(entry.scheme, statistics[decided.name], _float_dtype(layer), settings)
            quantization[layer.name] = LayerQuantization(activation, None if entry.weight_method == "float" else weight)
    return quantization
