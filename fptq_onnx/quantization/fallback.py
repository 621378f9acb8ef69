"""The fall-back chain static -> per token -> int8 weight -> float: which layers take how many steps of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum

from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.policy import Scheme

__all__ = ["Errors", "Step", "fall_back", "keep_float", "step_of"]


class Step(StrEnum):
    """How far a layer has fallen back, in order."""

    STATIC = "static"
    PER_TOKEN = "per-token"
    INT8 = "int8"
    FLOAT = "float"


_CHAIN = tuple(Step)
Errors = Mapping[str, Mapping[Step, float]]


def step_of(layer: LayerPlan) -> Step:
    """Where a layer of a plan stands in the chain."""
    if not layer.is_quantized:
        return Step.FLOAT
    if layer.weight_method == "int8":
        return Step.INT8
    return Step.STATIC if layer.scheme.is_static else Step.PER_TOKEN


def keep_float(plan: Plan, errors: Errors, count: int) -> Plan:
    """Keep the ``count`` quantized layers of largest output error float.

    Args:
        plan: The plan.
        errors: Relative squared output error of each layer at each step, by label.
        count: How many.
    """
    quantized = [layer for layer in plan.layers if layer.is_quantized and layer.label in errors]
    worst = sorted(quantized, key=lambda layer: -errors[layer.label][step_of(layer)])[:count]
    chosen = {layer.label for layer in worst}
    return _changed(plan, dict.fromkeys(chosen, Step.FLOAT), "one of the layers of largest output error")


def fall_back(plan: Plan, errors: Errors, fraction: float) -> Plan:
    """Take layers down the chain, worst first, until the sum of their errors is ``fraction`` of what it was.

    Layers that share an activation leave the static scheme together. Each turn takes the step that removes most error.

    Args:
        plan: The plan.
        errors: As for `keep_float`.
        fraction: 0..1.
    """
    layers = [layer for layer in plan.layers if layer.is_quantized and layer.label in errors]
    steps = {layer.label: step_of(layer) for layer in layers}
    readers: dict[str, list[str]] = {}
    for layer in layers:
        readers.setdefault(layer.activation, []).append(layer.label)
    moves = list(readers.values())
    total = sum(errors[label][step] for label, step in steps.items())
    target = total * fraction
    while total > target and steps:
        gains = []
        for group in moves:
            static = [label for label in group if steps[label] is Step.STATIC]
            for labels in [static] if static else [[label] for label in group]:
                below = {label: _next(steps[label]) for label in labels if steps[label] is not Step.FLOAT}
                gains.append((sum(errors[x][steps[x]] - errors[x][step] for x, step in below.items()), labels, below))
        gain, _, below = max(gains, key=lambda entry: entry[0])
        if not below:
            break
        # a step that gains nothing leads to one that does: float has no error
        steps |= below
        total -= gain
    changed = {layer.label: steps[layer.label] for layer in layers if steps[layer.label] is not step_of(layer)}
    return _changed(plan, changed, "fallen back to meet the allowed divergence")


def _next(step: Step) -> Step:
    return _CHAIN[min(_CHAIN.index(step) + 1, len(_CHAIN) - 1)]


def _changed(plan: Plan, steps: Mapping[str, Step], why: str) -> Plan:
    return dataclasses.replace(
        plan,
        layers=tuple(_at(layer, steps[layer.label], why) if layer.label in steps else layer for layer in plan.layers),
    )


def _at(layer: LayerPlan, step: Step, why: str) -> LayerPlan:
    reason = f"{layer.reason}; {step}: {why}"
    plain = dataclasses.replace(layer, equalization="none", alpha=None, shift=False, reason=reason)
    if step is Step.FLOAT:
        return dataclasses.replace(plain, scheme=Scheme.FLOAT, weight_method="float")
    weight = "int8" if step is Step.INT8 else layer.weight_method
    return dataclasses.replace(plain, scheme=Scheme.PER_TOKEN, weight_method=weight)
