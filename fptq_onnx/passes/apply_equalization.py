"""Divide activations by scales per channel and multiply the weights that read them: the function stays the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.activation_groups import ActivationGroup, group_by_activation
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.producers import ScaleTarget, find_scale_site
from fptq_onnx.passes.editing import add_constant
from fptq_onnx.passes.weights import replace_constant, replace_weight
from fptq_onnx.quantization.equalize import tie

__all__ = ["AppliedScale", "ApplyEqualizationPass"]

logger = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AppliedScale:
    """Where one activation's scale went.

    Attributes:
        scale: float32 [K], as applied: channels that come from one producer channel share the largest of their scales.
        kind: "norm", "linear" or "mul" (a node was inserted).
        reason: The place, or why it could not be folded; a clause for the report.
        activation: Name of the divided value, which the layers read now.
        scales_cache: Values in the key-value cache come out divided too.
    """

    scale: Float32
    kind: str
    reason: str
    activation: str
    scales_cache: bool


class ApplyEqualizationPass(ir.passes.InPlacePass):
    """X' = X / s and W' = diag(s) W, so that X' W' = X W (FPTQ).

    Rewrites:
        norm(x) * gamma            -> norm(x) * (gamma / s), LayerNorm's bias likewise
        f(x W_v + b_v)             -> f(x (W_v / s) + b_v / s) where f only moves or sums channels
        anything else              -> X * (1 / s), one Mul in front of the layers

    Weights become lazy tensors: they are scaled when somebody reads them.

    Args:
        scales: Activation name -> s, float32 [K], positive.
    """

    def __init__(self, scales: Mapping[str, Float32]) -> None:
        """Keep the scales; `applied` is filled when the pass runs."""
        self._scales = scales
        self.applied: dict[str, AppliedScale] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        for name, wanted in self._scales.items():
            # Anew for each activation: an earlier scale may have replaced weights that this one passes through.
            linears = find_linears(model)
            group = next(g for g in group_by_activation(linears.layers) if g.activation.name == name)
            site = find_scale_site(model, group, linears)
            scale = tie(wanted, site.tie_groups)
            activation = name
            if site.kind == "none":
                activation = _insert_mul(group, scale)
            for target in site.targets:
                _divide(model.graph, target, scale)
            for layer in group.layers:
                replace_weight(model.graph, layer, "equalized", partial(_multiply_rows, scale=scale))
            kind = "mul" if site.kind == "none" else site.kind
            self.applied[name] = AppliedScale(scale, kind, site.reason, activation, site.scales_cache)
            logger.info("equalized %s: %s, %s", name, kind, site.reason)
        return ir.passes.PassResult(model, bool(self._scales))


def _multiply_rows(weight: Float32, scale: Float32) -> Float32:
    return weight * scale[:, None]


def _divide(graph: ir.Graph, target: ScaleTarget, scale: Float32) -> None:
    rank = len(target.initializer.shape or ())
    per_entry = np.where(target.channels < 0, np.float32(1), scale[target.channels])
    divisor = per_entry.reshape([-1 if axis == target.axis else 1 for axis in range(rank)])
    for use in target.uses:
        replace_constant(graph, use.node, use.idx, "equalized", lambda array: array / divisor)


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
