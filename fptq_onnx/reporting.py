"""Fills in the report of a conversion from what the converter knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from fptq_onnx.calibration.data import CalibrationData
from fptq_onnx.graph.linears import LinearLayer, LinearSearch
from fptq_onnx.passes.apply_equalization import AppliedEqualization
from fptq_onnx.planning import GroupDecision
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import LayerReport, Report, SkippedReport, versions

__all__ = ["complete_layers", "start_report", "stored_bytes", "why_nothing"]


def start_report(
    source: Path,
    target: Path | None,
    output_format: str,
    model: ir.Model,
    linears: LinearSearch,
    entries: Mapping[str, LayerPlan],
    rotation: dict[str, str],
    settings: Recipe,
    data: CalibrationData,
    cut: str,
) -> Report:
    """The report as far as the plan goes.

    Args:
        source: The float model's file.
        target: The output; None for a dry run.
        output_format: How quantized layers are written.
        model: The float model.
        linears: What is in it.
        entries: The plan by node name.
        rotation: What was rotated, or why not.
        settings: The recipe.
        data: The calibration data.
        cut: Into what the model was cut, or why it was not.
    """
    return Report(
        model=str(source),
        output=None if target is None else str(target),
        format=output_format,
        calibration=data.description,
        data_free=data.source == "random",
        recipe=settings.resolved(),
        rotation=rotation,
        layers=[_layer_report(layer, entries[layer.name]) for layer in linears.layers],
        skipped=[SkippedReport(*skipped) for skipped in linears.skipped],
        bytes_before=stored_bytes(model),
        bytes_after=None,
        segments=cut,
        versions=versions(),
    )


def _layer_report(layer: LinearLayer, entry: LayerPlan) -> LayerReport:
    assert layer.weight.dtype is not None
    size = int(layer.k * layer.n * layer.weight.dtype.itemsize)
    return LayerReport(
        name=layer.name,
        label=layer.label,
        role=str(layer.role),
        k=layer.k,
        n=layer.n,
        range=entry.activation_range,
        scheme=str(entry.scheme),
        equalization="none",
        weight_method=entry.weight_method
        if entry.weight_method in ("float", "int8")
        else f"{entry.weight_method} g{entry.group_size}",
        snr_db=None,
        bytes_before=size,
        bytes_after=size,
        reason=entry.reason,
    )


def complete_layers(
    report: Report,
    model: ir.Model,
    applied: Mapping[str, AppliedEqualization],
    methods: Mapping[str, tuple[str, str]],
    decisions: Sequence[GroupDecision],
) -> None:
    """Fill in what is known only after the rewrite: where the scales went and the new sizes."""
    scales = {layer.name: applied.get(decided.name) for decided in decisions for layer in decided.group.layers}
    nodes = {node.name: node for node in model.graph}
    for layer in report.layers:
        scale = scales.get(layer.name)
        if scale is not None:
            layer.equalization = f"{scale.kind}: {scale.reason}"
        if layer.name in methods:
            method, why = methods[layer.name]
            layer.weight_method += f", {method}"
            layer.reason += f"; {why}"
        if layer.weight_method != "float":
            layer.bytes_after = _constant_bytes(nodes[layer.name])


def _constant_bytes(node: ir.Node) -> int:
    """Bytes of a node's weight: integers and scales, also behind the DequantizeLinear of the format qdq.

    Scalars are not counted: they belong to the activation, which other layers may share.
    """
    total = 0
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if value is not None and value.const_value is not None:
            if len(value.const_value.shape) == 0:
                continue
            total += int(value.const_value.nbytes)
        elif producer is not None and producer.op_type == "DequantizeLinear":
            total += _constant_bytes(producer)
    return total


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(int(v.const_value.nbytes) for v in model.graph.initializers.values() if v.const_value is not None)


def why_nothing(plan: Plan) -> str:
    """Why a plan quantizes no layer, a clause."""
    reasons = Counter(entry.reason for entry in plan.layers)
    return "no linear layer would be quantized: " + "; ".join(
        f"{reason} ({count})" for reason, count in reasons.items()
    )
