"""From a model's linear layers and their statistics to the plan, and from a (perhaps edited) plan to decisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fptq_onnx.graph.activation_groups import ActivationGroup
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.policy import Decision, Scheme, decide
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe

__all__ = ["GroupDecision", "decide_groups", "make_plan", "observed_groups"]


@dataclass(frozen=True, eq=False)
class GroupDecision:
    """One activation, the linear layers that read it, and what happens to it."""

    group: ActivationGroup
    decision: Decision

    @property
    def name(self) -> str:
        """Name of the activation's value."""
        assert self.group.activation.name is not None
        return self.group.activation.name


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
) -> list[GroupDecision]:
    """Apply the activation policy to every group that has a layer to quantize.

    Args:
        groups: All activations that linear layers read.
        statistics: Calibration statistics by activation name, at least of the groups with a participating layer.
        recipe: The settings of the policy.
        edited: A plan whose schemes and equalizations replace the policy's choices.

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
                wanted = dataclasses.replace(wanted, equalization=entry.equalization)
        assert group.activation.name is not None
        seen = statistics[group.activation.name]
        weights = _weight_absmax(layers) if wanted.equalization == "smoothquant" else None
        decisions.append(
            GroupDecision(group, decide(seen.channel_min, seen.channel_max, wanted, weight_absmax=weights))
        )
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
    )


def _weight_absmax(layers: Sequence[LinearLayer]) -> npt.NDArray[np.float32]:
    """Largest |W| of each input channel over `layers`, float32 [K]."""
    peak: npt.NDArray[np.float32] = np.max([np.abs(layer.weight_array()).max(axis=1) for layer in layers], axis=0)
    return peak
