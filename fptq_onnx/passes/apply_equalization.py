"""Shift and divide activations per channel, the weights and biases that read them inversely: the function stays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.activation_groups import ActivationGroup, group_by_activation
from fptq_onnx.graph.linears import LinearSearch, find_linears
from fptq_onnx.graph.producers import ScaleTarget, find_scale_site, find_shift_site
from fptq_onnx.passes.editing import add_constant
from fptq_onnx.passes.weights import replace_constant, replace_weight, shift_bias
from fptq_onnx.quantization.equalize import scale_rows, shift_output, smooth, tie

__all__ = ["AppliedEqualization", "ApplyEqualizationPass"]

logger = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AppliedEqualization:
    """Where one activation's shift and scale went.

    Attributes:
        scale: float32 [K], as applied: channels that come from one producer channel share the largest of their scales;
            None where the activation was only shifted.
        shift: float32 [K] that the activation loses before it is divided, or None.
        kind: Where the scale went: "norm", "linear" or "mul" (a node was inserted), "+shift" behind it for a shift too;
            "shift" for a shift alone.
        reason: The places, or why the scale could not be folded; a clause for the report.
        activation: Name of the changed value, which the layers read now.
        scales_cache: Values in the key-value cache come out changed too.
    """

    scale: Float32 | None
    shift: Float32 | None
    kind: str
    reason: str
    activation: str
    scales_cache: bool

    @property
    def key(self) -> str:
        """The same for the same scale and shift, and only then."""
        scale = "" if self.scale is None else self.scale.tobytes().hex()
        return scale if self.shift is None else f"{scale} less {self.shift.tobytes().hex()}"

    def smooth(self, x: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        """The changed activation for X [..., K] before."""
        return smooth(x, self.scale, self.shift)

    def undo(self, x: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        """X [..., K] as it was before, for the changed activation."""
        wide = x if self.scale is None else x * self.scale
        return wide if self.shift is None else wide + self.shift


class ApplyEqualizationPass(ir.passes.InPlacePass):
    """X' = (X - z) / s, W' = diag(s) W and b' = b + z W, so that X' W' + b' = X W + b (FPTQ; arXiv 2304.09145).

    Rewrites:
        norm(x) * gamma + beta     -> norm(x) * (gamma / s) + (beta - z) / s
        f(x W_v + b_v)             -> f(x (W_v / s) + (b_v - z) / s) where f only moves channels or takes their means
        anything else              -> X * (1 / s), one Mul in front of the layers; a shift is refused

    Weights become lazy tensors: they are scaled when somebody reads them. z W is computed at once, in float64.

    Args:
        scales: Activation name -> s, float32 [K], positive.
        shifts: Activation name -> z, float32 [K], equal over the tie groups of its `ShiftSite`.
    """

    def __init__(self, scales: Mapping[str, Float32], shifts: Mapping[str, Float32] | None = None) -> None:
        """Keep scales and shifts; `applied` is filled when the pass runs."""
        self._scales, self._shifts = scales, shifts or {}
        self.applied: dict[str, AppliedEqualization] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`; ValueError for a shift that cannot be folded."""
        names = list(dict.fromkeys([*self._shifts, *self._scales]))
        for name in names:
            applied = AppliedEqualization(None, None, "", "", name, False)
            if name in self._shifts:
                applied = _apply_shift(model, name, self._shifts[name])
            if name in self._scales:
                applied = _apply_scale(model, name, self._scales[name], applied)
            self.applied[name] = applied
            logger.info("equalized %s: %s, %s", name, applied.kind, applied.reason)
        return ir.passes.PassResult(model, bool(names))


def _find(model: ir.Model, name: str) -> tuple[ActivationGroup, LinearSearch]:
    """Anew for each change: an earlier one may have replaced constants that this one passes through."""
    linears = find_linears(model)
    return next(g for g in group_by_activation(linears.layers) if g.activation.name == name), linears


def _apply_shift(model: ir.Model, name: str, shift: Float32) -> AppliedEqualization:
    group, linears = _find(model, name)
    site = find_shift_site(group, linears)
    if site.target is None:
        raise ValueError(f"{name} cannot be shifted: {site.reason}")
    _change(model.graph, site.target, np.append(shift, np.float32(0)), np.subtract)
    for layer in group.layers:
        shift_bias(model.graph, layer, shift_output(shift, layer.weight_array()))
    return AppliedEqualization(None, shift, "shift", site.reason, name, site.scales_cache)


def _apply_scale(model: ir.Model, name: str, wanted: Float32, before: AppliedEqualization) -> AppliedEqualization:
    group, linears = _find(model, name)
    site = find_scale_site(model, group, linears)
    scale = tie(wanted, site.tie_groups)
    activation = _insert_mul(group, scale) if site.kind == "none" else name
    for target in site.targets:
        _change(model.graph, target, np.append(scale, np.float32(1)), np.divide)
    for layer in group.layers:
        replace_weight(model.graph, layer, "equalized", partial(scale_rows, scale=scale))
    kind, reason = "mul" if site.kind == "none" else str(site.kind), site.reason
    if before.shift is not None:
        kind, reason = f"{kind}+shift", f"{reason}; {before.reason}"
    return AppliedEqualization(scale, before.shift, kind, reason, activation, site.scales_cache or before.scales_cache)


def _change(graph: ir.Graph, target: ScaleTarget, operand: npt.NDArray[np.float32], change: np.ufunc) -> None:
    """Let the users of a constant read change(constant, operand), operand [K + 1], its last entry for channel -1."""
    rank = len(target.initializer.shape or ())
    spread = operand[target.channels].reshape([-1 if axis == target.axis else 1 for axis in range(rank)])
    for use in target.uses:
        replace_constant(graph, use.node, use.idx, "equalized", lambda array: change(array, spread))


def _insert_mul(group: ActivationGroup, scale: Float32) -> str:
    """Put X * (1 / s) between the activation and its linear layers; other readers keep X."""
    first, source = group.layers[0], group.activation
    graph = first.node.graph
    assert isinstance(graph, ir.Graph) and source.name is not None
    dtype = source.dtype or first.weight.dtype
    assert dtype is not None
    inverse = add_constant(graph, f"{source.name}.inverse_scale", (1 / scale).astype(dtype.numpy()))
    name = f"{source.name}.equalized"
    node = ir.node("Mul", [source, inverse], name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), source.shape
    graph.insert_before(first.node, [node])
    for layer in group.layers:
        layer.node.replace_input_with(0, output)
    return name
