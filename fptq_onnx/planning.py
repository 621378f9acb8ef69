"""From a model's linear layers and their statistics to the plan, and from a (perhaps edited) plan to decisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fptq_onnx.graph.activation_groups import ActivationGroup
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.quantization.equalize import scale_rows
from fptq_onnx.quantization.fallback import Step
from fptq_onnx.quantization.int4 import quantize_weight
from fptq_onnx.quantization.int8 import quantize_int8
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.policy import Decision, PolicySettings, Scheme, activation_range, decide
from fptq_onnx.quantization.search import quantize_per_token, quantize_static, search_scheme, token_weights
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe

__all__ = ["GroupDecision", "decide_groups", "make_plan", "observed_groups", "step_errors"]


@dataclass(frozen=True, eq=False)
class GroupDecision:
    """One activation, the linear layers that read it, and what happens to it."""

    group: ActivationGroup
    decision: Decision
    name: str = field(init=False)  # kept: the value loses its name when a rewritten one takes its place

    def __post_init__(self) -> None:
        """Take down the name of the activation's value."""
        assert self.group.activation.name is not None
        object.__setattr__(self, "name", self.group.activation.name)


def observed_groups(
    groups: Sequence[ActivationGroup], recipe: Recipe, edited: Plan | None = None
) -> list[ActivationGroup]:
    """Return the groups with at least one layer to quantize: those whose activation has to be calibrated."""
    return [group for group in groups if _participants(group, recipe, edited)]


def decide_groups(
    groups: Sequence[ActivationGroup],
    statistics: Mapping[str, ActivationStatistics],
    recipe: Recipe,
    edited: Plan | None = None,
    samples: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> list[GroupDecision]:
    """Apply the activation policy to every group that has a layer to quantize.

    Args:
        groups: All activations that linear layers read.
        statistics: Calibration statistics by activation name, at least of the groups with a participating layer.
        recipe: The settings of the policy.
        edited: A plan whose schemes and equalizations replace the policy's choices.
        samples: Tokens of each activation, float32 [tokens, K]; needed where the recipe searches.

    Returns:
        One decision per group, in order; groups without a participating layer are absent.
    """
    settings = recipe.policy()
    decisions = []
    for group in groups:
        layers = _participants(group, recipe, edited)
        if not layers:
            continue
        wanted = settings
        if edited is not None:
            entry = edited[layers[0].label]
            wanted = dataclasses.replace(settings, scheme=entry.scheme)
            if entry.scheme is Scheme.EQUALIZED_STATIC:
                alpha = settings.alpha if entry.alpha is None else entry.alpha
                wanted = dataclasses.replace(wanted, equalization=entry.equalization, alpha=alpha, insist=True)
        assert group.activation.name is not None
        seen = statistics[group.activation.name]
        weights = _weight_absmax(layers) if wanted.equalization == "smoothquant" else None
        decision = decide(seen.channel_min, seen.channel_max, wanted, weight_absmax=weights)
        between = decision.scheme is Scheme.EQUALIZED_STATIC or _undone(decision, wanted)
        if recipe.equalization.method == "search" and edited is None and wanted.scheme is None and between:
            assert samples is not None
            decision = _searched(decision, layers, seen, samples[group.activation.name], recipe)
        if edited is not None and wanted.scheme is Scheme.EQUALIZED_STATIC:
            decision = dataclasses.replace(decision, alpha=edited[layers[0].label].alpha)
        decisions.append(GroupDecision(group, decision))
    return decisions


def make_plan(layers: Sequence[LinearLayer], decisions: Sequence[GroupDecision], recipe: Recipe) -> Plan:
    """Write down one entry per linear layer of the model, those that stay float included."""
    by_layer = {layer.name: decided for decided in decisions for layer in decided.group.layers}
    return Plan(tuple(_entry(layer, by_layer.get(layer.name), recipe) for layer in layers), recipe.resolved())


def _participants(group: ActivationGroup, recipe: Recipe, edited: Plan | None) -> list[LinearLayer]:
    """Layers of `group` that are quantized: as the plan says, without one as the recipe allows."""
    if edited is not None:
        quantized = {entry.label for entry in edited.layers if entry.is_quantized}
        return [layer for layer in group.layers if layer.label in quantized]
    return [layer for layer in group.layers if recipe.layers.why_left_out(layer.label, layer.name, layer.role) is None]


def _entry(layer: LinearLayer, decided: GroupDecision | None, recipe: Recipe) -> LayerPlan:
    left_out = recipe.layers.why_left_out(layer.label, layer.name, layer.role)
    decision = decided.decision if decided else None
    scheme = Scheme.FLOAT if left_out or decision is None else decision.scheme
    quantized = scheme is not Scheme.FLOAT
    return LayerPlan(
        name=layer.name,
        label=layer.label,
        role=str(layer.role),
        block=layer.block,
        k=layer.k,
        n=layer.n,
        activation=layer.activation.name or "",
        activation_range=decision.activation_range if decision else None,
        scheme=scheme,
        equalization=decision.equalization if decision and quantized else "none",
        weight_method=recipe.layers.weight_method(layer.role, recipe.weights) if quantized else "float",
        group_size=recipe.weights.block_size(layer.k),
        reason=left_out or (decision.reason if decision else "no layer of its activation is quantized"),
        alpha=decision.alpha if decision and quantized else None,
    )


def step_errors(
    decisions: Sequence[GroupDecision], samples: Mapping[str, npt.NDArray[np.float32]], recipe: Recipe
) -> dict[str, dict[Step, float]]:
    """Relative squared output error of each layer at each step of the fall-back chain, by label.

    Each layer alone, on a sample of float inputs, its weight rounded to nearest.

    Args:
        decisions: What happens to each activation; the scheme static is judged with its equalization.
        samples: Tokens of each activation, float32 [tokens, K].
        recipe: Grid, group size and the cap of attention sinks.
    """
    errors: dict[str, dict[Step, float]] = {}
    for decided in decisions:
        x, scale = samples[decided.name], decided.decision.equalization_scale
        counted = token_weights(x, recipe.weights.token_cap)[:, None]
        smooth = x if scale is None else x / scale
        low, high = float(smooth.min(initial=0)), float(smooth.max(initial=0))
        inputs = {
            Step.STATIC: quantize_static(smooth, low, high, symmetric=recipe.activations.symmetric),
            Step.PER_TOKEN: quantize_per_token(x),
            Step.INT8: quantize_per_token(x),
        }
        for layer in decided.group.layers:
            weight = layer.weight_array()
            wanted = x @ weight
            signal = float(np.sum(counted * np.square(wanted, dtype=np.float64)))
            errors[layer.label] = {Step.FLOAT: 0.0}
            for step, seen in inputs.items():
                rows = weight if scale is None or step is not Step.STATIC else scale_rows(weight, scale)
                stored = _rounded(rows, seen, step, recipe)
                noise = float(np.sum(counted * np.square(seen @ stored - wanted, dtype=np.float64)))
                errors[layer.label][step] = noise / signal if signal > 0 else 0.0
    return errors


def _rounded(
    weight: npt.NDArray[np.float32], seen: npt.NDArray[np.float32], step: Step, recipe: Recipe
) -> npt.NDArray[np.float32]:
    """A weight as it is stored at a step of the chain."""
    if recipe.weights.format == "float":
        return weight
    if step is Step.INT8:
        return quantize_int8(weight, np.float32).dequantize()
    importance = np.mean(np.square(seen, dtype=np.float64), axis=0)
    block = recipe.weights.block_size(weight.shape[0])
    return quantize_weight(weight, block, recipe.weights.grid, np.float32, importance=importance).dequantize()


def _undone(decision: Decision, settings: PolicySettings) -> bool:
    """Whether an activation between the thresholds was left to per-token scales since LAE would not help it."""
    return decision.scheme is Scheme.PER_TOKEN and decision.activation_range < settings.v1


def _searched(
    decision: Decision,
    layers: Sequence[LinearLayer],
    seen: ActivationStatistics,
    sample: npt.NDArray[np.float32],
    recipe: Recipe,
) -> Decision:
    """What errs least among the static choices, or per token."""
    weights = recipe.weights
    found = search_scheme(
        sample,
        [layer.weight_array() for layer in layers],
        seen.channel_min,
        seen.channel_max,
        group_size=weights.block_size(layers[0].k),
        grid=weights.grid,
        symmetric=recipe.activations.symmetric,
        floor=recipe.equalization.floor,
        tolerance=recipe.equalization.tolerance,
        token_cap=weights.token_cap,
        scale_bits=recipe.equalization.scale_bits,
    )
    best = found.chosen
    after = decision.activation_range
    if best.scale is not None:
        after = activation_range(seen.channel_min / best.scale, seen.channel_max / best.scale, recipe.activations.range)
    return dataclasses.replace(
        decision,
        scheme=best.scheme,
        equalization=best.equalization,
        equalization_scale=best.scale,
        equalized_range=after,
        reason=f"range {decision.activation_range:.4g}, {found.reason}",
        alpha=best.alpha if best.equalization == "smoothquant" else None,
    )


def _weight_absmax(layers: Sequence[LinearLayer]) -> npt.NDArray[np.float32]:
    """Largest |W| of each input channel over `layers`, float32 [K]."""
    peak: npt.NDArray[np.float32] = np.max([np.abs(layer.weight_array()).max(axis=1) for layer in layers], axis=0)
    return peak
