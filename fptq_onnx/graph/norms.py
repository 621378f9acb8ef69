"""Find the normalizations of a model, whether one fused operator or the six or more small ones exporters write."""

from __future__ import annotations

__all__ = ["Norm", "find_norms", "normalized_input"]

import dataclasses
from typing import Literal

import onnx_ir as ir

from fptq_onnx.graph.constants import constant_number, constant_shape, root_initializer

# (domain, op type) -> (kind, index of weight, index of bias or None); input 0 is normalized ("Skip": plus input 1).
FUSED_NORMS: dict[tuple[str, str], tuple[Literal["rms", "layer"], int, int | None]] = {
    ("", "LayerNormalization"): ("layer", 1, 2),
    ("", "RMSNormalization"): ("rms", 1, None),
    ("", "SimplifiedLayerNormalization"): ("rms", 1, None),  # onnxruntime keeps this one in the ONNX domain
    ("com.microsoft", "SimplifiedLayerNormalization"): ("rms", 1, None),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): ("rms", 2, None),
    ("com.microsoft", "SkipLayerNormalization"): ("layer", 2, 3),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """y = normalize(x) * weight (+ bias) over the last dimension.

    Attributes:
        kind: "rms" or "layer" (mean subtracted).
        fused: One operator, or several small ones.
        node: The fused operator, or the Mul by the weight.
        input: The value x; for the Skip operators None, as the sum exists only inside (see ``residual``).
        output: The value y.
        weight: Root initializer of the weight [K].
        bias: Root initializer of the bias [K], or None.
        residual: For the Skip operators the sum that goes on along the residual stream, where it is an output.
        epsilon: Added to the mean square (or variance).
    """

    kind: Literal["rms", "layer"]
    fused: bool
    node: ir.Node
    input: ir.Value | None
    output: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    residual: ir.Value | None
    epsilon: float


def find_norms(model: ir.Model) -> list[Norm]:
    """Return the normalizations with a constant weight in the main graph, in execution order.

    Norms inside attention (over the channels of one head) are found too; weights of one element per channel are told
    apart from them by their size.
    """
    norms = []
    for node in model.graph:
        norm = _fused(node) if (node.domain, node.op_type) in FUSED_NORMS else _exploded(node)
        if norm is not None:
            norms.append(norm)
    return norms


def normalized_input(value: ir.Value) -> ir.Value | None:
    """Return x when a value is x over its root mean square, computed by small operators; None for any other value.

    Accepts x * r and x / d where r and d come from ReduceMean over the squares of x (Pow or Mul) through Add, Sqrt or
    Pow, Reciprocal or Div, and Cast.
    """
    found = _normalized(value)
    return None if found is None else found[0]


def _normalized(value: ir.Value) -> tuple[ir.Value, float] | None:
    """Return x of `normalized_input` and the epsilon."""
    node = _producer(value)
    if node is None or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for data in (0, 1) if node.op_type == "Mul" else (0,):
        x = node.inputs[data]
        exponent = -0.5 if node.op_type == "Mul" else 0.5
        epsilon = None if x is None else _power_of_mean_square(node.inputs[1 - data], x, exponent)
        if x is not None and epsilon is not None:
            return x, epsilon
    return None


def _fused(node: ir.Node) -> Norm | None:
    kind, weight_index, bias_index = FUSED_NORMS[node.domain, node.op_type]
    weight = root_initializer(node.inputs[weight_index]) if len(node.inputs) > weight_index else None
    if weight is None:
        return None
    bias = root_initializer(node.inputs[bias_index]) if bias_index and len(node.inputs) > bias_index else None
    skip = node.op_type.startswith("Skip")
    has_sum = skip and len(node.outputs) > 3 and bool(node.outputs[3].uses() or node.outputs[3].is_graph_output())
    return Norm(
        kind,
        True,
        node,
        None if skip else node.inputs[0],
        node.outputs[0],
        weight[0],
        bias[0] if bias else None,
        node.outputs[3] if has_sum else None,
        node.attributes.get_float("epsilon", 1e-12 if skip else 1e-5),
    )


def _exploded(node: ir.Node) -> Norm | None:
    if node.op_type != "Mul" or node.domain != "":
        return None
    for side in (0, 1):
        weight = root_initializer(node.inputs[side])
        if weight is None or len(constant_shape(*weight)) != 1:
            continue
        normalized = _through_cast(node.inputs[1 - side])
        found = None if normalized is None else _normalized(normalized)
        if found is None:
            return None
        x, epsilon = found
        x, centred = _uncentred(_through_cast(x) or x)
        output, bias = node.outputs[0], None
        if centred:
            output, bias = _bias_after(output)
        kind: Literal["rms", "layer"] = "layer" if centred else "rms"
        return Norm(kind, False, node, x, output, weight[0], bias, None, epsilon)
    return None


def _bias_after(output: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        found = root_initializer(uses[0].node.inputs[1 - uses[0].idx])
        if found is not None:
            return uses[0].node.outputs[0], found[0]
    return output, None


def _uncentred(x: ir.Value) -> tuple[ir.Value, bool]:
    """Return what the mean was subtracted from, and whether one was."""
    node = _producer(x)
    if node is not None and node.op_type == "Sub" and node.inputs[0] is not None:
        mean = None if node.inputs[1] is None else _producer(node.inputs[1])
        if mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is node.inputs[0]:
            return _through_cast(node.inputs[0]) or node.inputs[0], True
    return x, False


def _power_of_mean_square(value: ir.Value | None, x: ir.Value, wanted: float) -> float | None:
    """Return epsilon when a value is (mean(x^2) + epsilon) to the power ``wanted``, else None."""
    power, epsilon = 1.0, 0.0
    for _ in range(8):
        node = None if value is None else _producer(value)
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        value = node.inputs[0]
        if node.op_type == "Sqrt":
            power *= 0.5
        elif node.op_type == "Reciprocal":
            power *= -1.0
        elif node.op_type == "Pow":
            power *= constant_number(node.inputs[1]) or 0.0
        elif node.op_type == "Div" and constant_number(value) == 1.0:
            power *= -1.0
            value = node.inputs[1]
        elif node.op_type == "Add" and (addend := constant_number(value)) is not None:
            epsilon, value = epsilon + addend, node.inputs[1]
        elif node.op_type == "Add" and (addend := constant_number(node.inputs[1])) is not None:
            epsilon += addend
        elif node.op_type == "ReduceMean":
            return epsilon if power == wanted and _is_square(value, x) else None
        elif node.op_type not in ("Cast", "Identity"):
            return None
    return None


def _is_square(value: ir.Value, x: ir.Value) -> bool:
    node = _producer(_through_cast(value) or value)
    if node is None or node.inputs[0] is None:
        return False
    same = _through_cast(node.inputs[0]) is _through_cast(x)
    if node.op_type == "Pow":
        return same and constant_number(node.inputs[1]) == 2.0
    return same and node.op_type == "Mul" and _through_cast(node.inputs[1]) is _through_cast(x)


def _producer(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.domain == "" else None


def _through_cast(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := _producer(value)) is not None and node.op_type in ("Cast", "Identity"):
        value = node.inputs[0]
    return value
