"""From a model's linear layers and their statistics to the plan, and from a (perhaps edited) plan to decisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import RecipeError
from fptq_onnx.graph.activation_groups import ActivationGroup
from fptq_onnx.graph.linears import LinearLayer, LinearSearch
from fptq_onnx.graph.producers import ShiftSite, find_shift_site
from fptq_onnx.quantization.equalize import channel_shift, scale_rows, shift_output
from fptq_onnx.quantization.fallback import Step
from fptq_onnx.quantization.int4 import quantize_weight
from fptq_onnx.quantization.int8 import quantize_int8
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.policy import Decision, PolicySettings, Scheme, activation_range, decide
from fptq_onnx.quantization.search import (
    OutputError,
    quantize_per_token,
    quantize_static,
    search_scheme,
    token_weights,
)
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
    linears: LinearSearch | None = None,
) -> list[GroupDecision]:
    """Apply the activation policy to every group that has a layer to quantize.

    Args:
        groups: All activations that linear layers read.
        statistics: Calibration statistics by activation name, at least of the groups with a participating layer.
        recipe: The settings of the policy.
        edited: A plan whose schemes and equalizations replace the policy's choices.
        samples: Tokens of each activation, float32 [tokens, K]; needed where the recipe searches.
        linears: The search that found the groups; needed where the recipe or the plan shifts.

    Returns:
        One decision per group, in order; groups without a participating layer are absent.

    Raises:
        RecipeError: The plan shifts an activation whose shift no bias of the model can take.
    """
    decisions = []
    for group in groups:
        layers = _participants(group, recipe, edited)
        if not layers:
            continue
        assert group.activation.name is not None
        seen = statistics[group.activation.name]
        if edited is not None:
            decision = _as_planned(edited[layers[0].label], group, layers, seen, recipe, linears)
        else:
            sample = (samples or {}).get(group.activation.name)
            decision = _by_recipe(group, layers, seen, recipe, sample, linears)
        decisions.append(GroupDecision(group, decision))
    return decisions


def _as_planned(
    entry: LayerPlan,
    group: ActivationGroup,
    layers: Sequence[LinearLayer],
    seen: ActivationStatistics,
    recipe: Recipe,
    linears: LinearSearch | None,
) -> Decision:
    """What an edited plan says."""
    wanted = dataclasses.replace(recipe.policy(), scheme=entry.scheme)
    if entry.scheme is Scheme.EQUALIZED_STATIC:
        alpha = wanted.alpha if entry.alpha is None else entry.alpha
        wanted = dataclasses.replace(wanted, equalization=entry.equalization, alpha=alpha, insist=True)
    shift = None
    if entry.shift:
        site = _shift_site(group, linears)
        if site.target is None:
            raise RecipeError(f"plan {entry.label}.shift", f"it would cost time: {site.reason}", "Set it to false")
        shift = _shift(seen, site, recipe)
    decision = _decide(seen, wanted, layers, shift)
    alpha_kept = entry.alpha if entry.scheme is Scheme.EQUALIZED_STATIC else decision.alpha
    return dataclasses.replace(decision, alpha=alpha_kept)


def _by_recipe(
    group: ActivationGroup,
    layers: Sequence[LinearLayer],
    seen: ActivationStatistics,
    recipe: Recipe,
    sample: npt.NDArray[np.float32] | None,
    linears: LinearSearch | None,
) -> Decision:
    """What the policy says, or a search by the output error of the layers."""
    wanted, shift = recipe.policy(), None
    if recipe.equalization.shift:
        site = _shift_site(group, linears)
        shift = None if site.target is None else _shift(seen, site, recipe)
    decision = _decide(seen, wanted, layers)
    between = decision.scheme is Scheme.EQUALIZED_STATIC or _undone(decision, wanted)
    if recipe.equalization.method == "search" and wanted.scheme is None and between:
        assert sample is not None
        return _searched(decision, layers, seen, sample, recipe, shift)
    if shift is None or decision.scheme is Scheme.FLOAT:
        return decision
    assert sample is not None
    shifted = _decide(seen, dataclasses.replace(wanted, scheme=decision.scheme), layers, shift)
    return _better(decision, shifted, layers, seen, sample, recipe)


def _decide(
    seen: ActivationStatistics,
    wanted: PolicySettings,
    layers: Sequence[LinearLayer],
    shift: npt.NDArray[np.float32] | None = None,
) -> Decision:
    """The policy's decision for X, or for X less a shift."""
    weights = _weight_absmax(layers) if wanted.equalization == "smoothquant" else None
    low, high = (seen.channel_min, seen.channel_max)
    if shift is None:
        return decide(low, high, wanted, weight_absmax=weights)
    decision = decide(low - shift, high - shift, wanted, weight_absmax=weights)
    before = activation_range(low, high, wanted.range_kind)
    return dataclasses.replace(decision, activation_range=before, shift=shift)


def _better(
    decision: Decision,
    shifted: Decision,
    layers: Sequence[LinearLayer],
    seen: ActivationStatistics,
    sample: npt.NDArray[np.float32],
    recipe: Recipe,
) -> Decision:
    """The shifted decision where the layers' outputs err less with it."""
    error = OutputError(
        sample,
        [layer.weight_array() for layer in layers],
        seen.channel_min,
        seen.channel_max,
        group_size=recipe.weights.block_size(layers[0].k),
        grid=recipe.weights.grid if recipe.weights.format == "int4" else None,
        symmetric=recipe.activations.symmetric,
        token_cap=recipe.weights.token_cap,
        bias_correction=_corrects(layers, recipe),
    )
    without, with_it = (
        error(scale=d.equalization_scale, shift=d.shift, per_token=d.scheme is Scheme.PER_TOKEN)
        for d in (decision, shifted)
    )
    chosen = shifted if with_it < without else decision
    kept = "kept" if chosen is shifted else "left out"
    reason = f"{decision.reason}; shift {kept}: output error {with_it:.3g} with it, {without:.3g} without"
    return dataclasses.replace(chosen, reason=reason)


def _corrects(layers: Sequence[LinearLayer], recipe: Recipe) -> bool:
    """Whether biases will make up for what rounding the weights moves the mean outputs by."""
    return recipe.weights.bias_correction and all(layer.bias is not None for layer in layers)


def _shift_site(group: ActivationGroup, linears: LinearSearch | None) -> ShiftSite:
    assert linears is not None
    return find_shift_site(group, linears)


def _shift(seen: ActivationStatistics, site: ShiftSite, recipe: Recipe) -> npt.NDArray[np.float32]:
    return channel_shift(seen.channel_min, seen.channel_max, site.tie_groups, recipe.equalization.scale_bits)


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
        shift=decision is not None and quantized and decision.shift is not None,
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
        x, scale, shift = samples[decided.name], decided.decision.equalization_scale, decided.decision.shift
        counted = token_weights(x, recipe.weights.token_cap)[:, None]
        smooth = decided.decision.smooth(x)
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
                output = seen @ stored
                if shift is not None and step is Step.STATIC:
                    output += shift_output(shift, weight)
                noise = float(np.sum(counted * np.square(output - wanted, dtype=np.float64)))
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
    shift: npt.NDArray[np.float32] | None,
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
        shift=shift,
        bias_correction=_corrects(layers, recipe),
    )
    best = found.chosen
    chosen = dataclasses.replace(
        decision,
        scheme=best.scheme,
        equalization=best.equalization,
        equalization_scale=best.scale,
        reason=f"range {decision.activation_range:.4g}, {found.reason}",
        alpha=best.alpha if best.equalization == "smoothquant" else None,
        shift=best.shift,
    )
    low, high = chosen.smooth(seen.channel_min), chosen.smooth(seen.channel_max)
    return dataclasses.replace(chosen, equalized_range=activation_range(low, high, recipe.activations.range))


def _weight_absmax(layers: Sequence[LinearLayer]) -> npt.NDArray[np.float32]:
    """Largest |W| of each input channel over `layers`, float32 [K]."""
    peak: npt.NDArray[np.float32] = np.max([np.abs(layer.weight_array()).max(axis=1) for layer in layers], axis=0)
    return peak
