"""Find the linear layers of a model: MatMul and Gemm nodes with one constant weight matrix."""

from __future__ import annotations

__all__ = ["LinearLayer", "LinearSearch", "SkippedNode", "find_linears"]

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fptq_onnx.errors import ModelError
from fptq_onnx.graph.constants import constant_array, constant_shape, root_initializer
from fptq_onnx.graph.dataflow import Dataflow, trace
from fptq_onnx.graph.roles import Role, assign_roles

logger = logging.getLogger(__name__)

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Operators that hold a weight matrix in a form that is not read here.
_OPAQUE = {
    ("", "MatMulInteger"): "it is already quantized",
    ("", "QLinearMatMul"): "it is already quantized",
    ("com.microsoft", "MatMulNBits"): "it is already quantized",
    ("com.microsoft", "MatMulBnb4"): "it is already quantized",
    ("com.microsoft", "DynamicQuantizeMatMul"): "it is already quantized",
    ("com.microsoft", "MatMulIntegerToFloat"): "it is already quantized",
    ("com.microsoft", "QGemm"): "it is already quantized",
    ("com.microsoft", "QAttention"): "it is already quantized",
    ("fptq", "W4A8MatMul"): "it is already quantized",
    ("fptq", "W8A8MatMul"): "it is already quantized",
    ("fptq", "DynamicQuantizeW4A8MatMul"): "it is already quantized",
    ("com.microsoft", "Attention"): "its projection weights are inside a fused operator; export without fusion",
    ("com.microsoft", "FusedMatMul"): "it is a fused operator; export without graph optimization",
    ("com.microsoft", "FusedGemm"): "it is a fused operator; export without graph optimization",
    ("com.microsoft", "MoE"): "its expert weights are inside a fused operator",
    ("com.microsoft", "QMoE"): "it is already quantized",
}


class SkippedNode(NamedTuple):
    """A node that multiplies matrices but is not handled as a linear layer, and why."""

    node_name: str
    op_type: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLayer:
    """One MatMul or Gemm: Y[..., N] = X[..., K] W[K, N] (+ b[N]).

    Attributes:
        name: Name of the node, unique in the graph.
        node: The MatMul or Gemm.
        activation: The value X, input 0 of the node.
        weight: The initializer that W is computed from; it may have other readers (tied or shared weights).
        weight_path: Transpose, Identity, Cast, DequantizeLinear nodes from ``weight`` to the node in data-flow order.
        bias: The initializer that b is computed from, if there is one.
        bias_node: The Add that applies b; None for Gemm's own bias.
        k: Rows of W, the reduced dimension.
        n: Columns of W.
        role: What the layer is for.
        block: Index of its block; None outside the blocks.
        ordinal: 0 for the first layer with this role in this block, then 1, 2, ...
    """

    name: str
    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    weight_path: tuple[ir.Node, ...]
    bias: ir.Value | None
    bias_node: ir.Node | None
    k: int
    n: int
    role: Role
    block: int | None
    ordinal: int

    @property
    def label(self) -> str:
        """Name that is the same in every export of one model: "block.3.q", "lm_head", "other.5"."""
        if self.role is Role.OTHER:
            return f"other.{self.ordinal}"
        label = str(self.role) if self.block is None else f"block.{self.block}.{self.role}"
        return f"{label}.{self.ordinal}" if self.ordinal else label

    @property
    def output(self) -> ir.Value:
        """The value Y: output of the bias Add where there is one, else of the node."""
        return self.node.outputs[0] if self.bias_node is None else self.bias_node.outputs[0]

    def weight_array(self) -> np.ndarray:
        """Return W as a new float32 array [K, N], with the weight path and Gemm's transB and alpha applied.

        Read from the graph as it is now, so changes to the weight since the search are seen.
        """
        array = _constant(self.node.inputs[1])
        if _int(self.node, "transB", 0):
            array = array.T
        alpha = _float(self.node, "alpha", 1.0)
        return np.array(array, order="C") if alpha == 1.0 else np.ascontiguousarray(array * np.float32(alpha))

    def bias_array(self) -> np.ndarray | None:
        """Return b as a new float32 array [N], with Gemm's beta applied; None without bias."""
        if self.bias is None:
            return None
        operand = self.node.inputs[2] if self.bias_node is None else _constant_operand(self.bias_node)
        array = _constant(operand)
        scale = np.float32(_float(self.node, "beta", 1.0) if self.bias_node is None else 1.0)
        return np.array(np.broadcast_to(array.reshape(-1) * scale, (self.n,)))


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSearch:
    """Every linear layer in execution order, and every other matrix product with the reason it was left alone."""

    layers: list[LinearLayer]
    skipped: list[SkippedNode]
    flow: Dataflow

    def by_label(self) -> dict[str, LinearLayer]:
        """Return the layers keyed by label."""
        return {layer.label: layer for layer in self.layers}


class _Candidate(NamedTuple):
    node: ir.Node
    weight: ir.Value
    path: tuple[ir.Node, ...]
    k: int
    n: int


def find_linears(model: ir.Model) -> LinearSearch:
    """Find the linear layers of the main graph with role, block and bias.

    Args:
        model: A model with named nodes, as ``load_model`` returns it. It is not changed.

    Returns:
        The layers in execution order, and one ``SkippedNode`` for every MatMul or Gemm that is not a linear layer with
        a constant float [K, N] weight on the right, for every one in a subgraph or function, and for operators that
        hold weights in a form of their own.
    """
    candidates: list[_Candidate] = []
    skipped: list[SkippedNode] = []
    for node in model.graph:
        if node.domain == "" and node.op_type in ("MatMul", "Gemm"):
            found = _examine(node)
            if isinstance(found, _Candidate):
                candidates.append(found)
            else:
                skipped.append(SkippedNode(node.name or "", node.op_type, found))
        elif reason := _opaque_reason(node):
            skipped.append(SkippedNode(node.name or "", node.op_type, reason))
        for inner in _subgraph_nodes(node):
            if _multiplies(inner):
                reason = f"it is inside the {node.op_type} node {node.name}"
                skipped.append(SkippedNode(inner.name or "", inner.op_type, reason))
    for function in model.functions.values():
        reason = f"it is inside the function {function.domain}.{function.name}; inline functions before conversion"
        skipped += [
            SkippedNode(node.name or "", node.op_type, reason) for node in function.all_nodes() if _multiplies(node)
        ]

    sizes = {candidate.node: (candidate.k, candidate.n) for candidate in candidates}
    flow = trace(model.graph, sizes.keys())
    roles = assign_roles(model.graph, flow, sizes)
    seen: collections.Counter[tuple[Role, int | None]] = collections.Counter()
    layers = []
    for node, weight, path, k, n in candidates:
        activation, assigned = node.inputs[0], roles[node]
        bias, bias_node = _find_bias(node, n)
        assert activation is not None
        layers.append(
            LinearLayer(
                node.name or "", node, activation, weight, path, bias, bias_node, k, n, *assigned, seen[assigned]
            )
        )
        seen[assigned] += 1
    logger.debug("%d linear layers, %d other matrix products", len(layers), len(skipped))
    return LinearSearch(layers, skipped, flow)


def _examine(node: ir.Node) -> _Candidate | str:
    """Return what makes ``node`` a linear layer, or the reason why it is none."""
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return "it lacks an input"
    left, right = root_initializer(node.inputs[0]), root_initializer(node.inputs[1])
    if right is None:
        return _not_constant(node, left is not None)
    if left is not None:
        return "both operands are constant"
    weight, path = right
    shape = constant_shape(weight, path)
    if len(shape) != 2:
        return f"its weight {weight.name} has shape {list(shape)}, not [K, N]"
    k, n = (shape[1], shape[0]) if _int(node, "transB", 0) else shape
    if k == 0 or n == 0:
        return f"its weight {weight.name} is empty"
    if weight.graph is not node.graph:
        return f"its weight {weight.name} belongs to another graph"
    dtype = _dtype_after(weight, path)
    if dtype not in _FLOATS:
        return f"its weight {weight.name} is {dtype.name.lower()}, not float32, float16 or bfloat16"
    if _int(node, "transA", 0):
        return "it transposes its activation (transA)"
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        found = root_initializer(node.inputs[2])
        if found is None:
            return "it adds a computed value (input C), not a constant bias"
        bias_shape = constant_shape(*found)
        if int(np.prod(bias_shape)) not in (1, n) or (bias_shape and bias_shape[-1] not in (1, n)):
            return f"its bias {found[0].name} has shape {list(bias_shape)}, not [N]"
    return _Candidate(node, weight, path, k, n)


def _not_constant(node: ir.Node, left_constant: bool) -> str:
    weight = node.inputs[1]
    assert weight is not None
    if left_constant:
        return "its constant operand is on the left"
    if weight.is_graph_input():
        return f"its right operand {weight.name} is a graph input, so its values are not known"
    producer = weight.producer()
    if producer is not None and root_initializer(producer.inputs[0] if producer.inputs else None) is not None:
        return f"its weight comes through a {producer.op_type} node, which is not followed"
    if producer is not None and producer.op_type == "Constant":
        return "its weight is in a Constant node; load the model with load_model, which makes it an initializer"
    return "both operands are activations"


def _find_bias(node: ir.Node, n: int) -> tuple[ir.Value | None, ir.Node | None]:
    if node.op_type == "Gemm":
        found = root_initializer(node.inputs[2]) if len(node.inputs) > 2 else None
        return (found[0] if found else None), None
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and not output.is_graph_output() and uses[0].node.graph is node.graph:
        add = uses[0].node
        if add.op_type == "Add" and add.domain == "":
            found = root_initializer(add.inputs[1 - uses[0].idx])
            if found is not None:
                shape = constant_shape(*found)
                if shape and shape[-1] == n and int(np.prod(shape)) == n:
                    return found[0], add
    return None, None


def _constant(value: ir.Value | None) -> np.ndarray:
    array = constant_array(value)
    if array is None:
        raise ModelError(f"value {value.name if value else None}", "it is no longer constant", "search the model again")
    return array.astype(np.float32)


def _constant_operand(add: ir.Node) -> ir.Value | None:
    return next(operand for operand in add.inputs if root_initializer(operand) is not None)


def _dtype_after(weight: ir.Value, path: tuple[ir.Node, ...]) -> ir.DataType:
    dtype = weight.const_value.dtype if weight.const_value is not None else ir.DataType.UNDEFINED
    for node in path:
        if node.op_type == "Cast":
            dtype = ir.DataType(node.attributes["to"].as_int())
        elif node.op_type == "DequantizeLinear" and node.inputs[1] is not None:
            found = root_initializer(node.inputs[1])
            assert found is not None
            dtype = _dtype_after(*found)
    return dtype


def _opaque_reason(node: ir.Node) -> str | None:
    if node.op_type == "Attention" and root_initializer(node.inputs[1] if len(node.inputs) > 1 else None) is None:
        return None
    return _OPAQUE.get((node.domain, node.op_type))


def _multiplies(node: ir.Node) -> bool:
    return (node.domain == "" and node.op_type in ("MatMul", "Gemm")) or _opaque_reason(node) is not None


def _subgraph_nodes(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield from ir.traversal.RecursiveGraphIterator(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from ir.traversal.RecursiveGraphIterator(graph)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default
