"""Carries decisions out: equalizes the float model and computes the constants of every quantized layer."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.calibration import Calibration
from fptq_onnx.calibration.moments import SplitMoments
from fptq_onnx.errors import ModelError
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.passes.apply_equalization import AppliedScale, ApplyEqualizationPass
from fptq_onnx.passes.replace_linears import (
    ActivationQuantizer,
    LayerQuantization,
    PerTokenQuantizer,
    StaticQuantizer,
)
from fptq_onnx.passes.rotate_heads import RotateHeadsPass
from fptq_onnx.passes.rotate_residual import RotateResidualPass
from fptq_onnx.planning import GroupDecision
from fptq_onnx.quantization.int4 import QuantizedWeight, quantize_weight
from fptq_onnx.quantization.plan import LayerPlan
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.quantization.refine import refine
from fptq_onnx.quantization.static_range import activation_qparams, static_bounds
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe

__all__ = ["equalize", "equalized_statistics", "input_moments", "layer_quantization", "rotate"]

logger = logging.getLogger(__name__)


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
    calibration: Calibration,
) -> dict[str, ActivationStatistics]:
    """Statistics of X / s by the name of X: exact from those of X, unless the range needs the new histogram."""
    if settings.activations.static_range != "absmax" and applied:
        fresh = calibration.observe(model, [scale.activation for scale in applied.values()])
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


def input_moments(
    model: ir.Model,
    decisions: Sequence[GroupDecision],
    entries: Mapping[str, LayerPlan],
    statistics: Mapping[str, ActivationStatistics],
    applied: Mapping[str, AppliedScale],
    settings: Recipe,
    calibration: Calibration,
) -> dict[str, SplitMoments]:
    """Second moments of the equalized model's activations, by their names before equalization; empty if not needed."""
    methods = {entries[layer.name].weight_method for d in decisions for layer in d.group.layers} - {"float"}
    if "weighted_clip" not in methods and not (methods and settings.weights.rounding == "gptq"):
        return {}
    values = {d.name: applied[d.name].activation if d.name in applied else d.name for d in decisions}
    channels = {values[d.name]: d.group.k for d in decisions}
    multiple = settings.weights.token_cap
    caps = {
        values[name]: math.inf
        if multiple == 0 or name in applied
        else multiple * float(np.median(statistics[name].token_absmax))
        for name in values
    }
    found = calibration.moments(model, channels, caps)
    return {name: found[value] for name, value in values.items()}


def _weight(
    layer: LinearLayer,
    entry: LayerPlan,
    moments: SplitMoments | None,
    settings: Recipe,
    methods: dict[str, tuple[str, str]],
) -> QuantizedWeight:
    assert entry.weight_method != "float"
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


def layer_quantization(
    decisions: Sequence[GroupDecision],
    entries: Mapping[str, LayerPlan],
    statistics: Mapping[str, ActivationStatistics],
    moments: Mapping[str, SplitMoments],
    settings: Recipe,
    methods: dict[str, tuple[str, str]],
) -> dict[str, LayerQuantization]:
    """What the rewriting pass needs, by node name; weights are quantized when the pass reaches them.

    Args:
        decisions: What happens to each activation.
        entries: The plan by node name.
        statistics: Of the equalized activations.
        moments: From `input_moments`.
        settings: The recipe.
        methods: Filled, once a weight is refined, with its method and the comparison behind it, by node name.
    """
    quantization = {}
    for decided in decisions:
        for layer in decided.group.layers:
            entry = entries[layer.name]
            if not entry.is_quantized:
                continue

            def weight(current: LinearLayer, entry: LayerPlan = entry, name: str = decided.name) -> QuantizedWeight:
                try:
                    return _weight(current, entry, moments.get(name), settings, methods)
                except ModelError as error:
                    raise ModelError(f"weight of {entry.label} ({current.name})", error.reason, error.fix) from error

            activation = _quantizer(entry.scheme, statistics[decided.name], _float_dtype(layer), settings)
            quantization[layer.name] = LayerQuantization(activation, None if entry.weight_method == "float" else weight)
    return quantization
