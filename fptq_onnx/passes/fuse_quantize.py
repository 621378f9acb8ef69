"""RMSNorm or SiLU(gate) * up, followed by a quantize node -> one op that reads its input once and writes uint8."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.constants import constant_array
from fptq_onnx.graph.norms import Norm, find_norms
from fptq_onnx.ops import DOMAIN, dynamic_quantize_per_token
from fptq_onnx.ops.fused_quantize import StaticTarget, rms_norm_quantize, silu_mul_quantize
from fptq_onnx.passes.editing import add_constant, take_over

__all__ = ["FuseQuantizePass"]

logger = logging.getLogger(__name__)

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class FuseQuantizePass(ir.passes.InPlacePass):
    """Fuse where the quantize node is the only reader of what is quantized.

    A residual Add in front of a norm goes into the fused op too; its sum stays a value of the graph. Norms are found in
    every form that `find_norms` knows. Whatever else reads the float value keeps it, and then nothing is fused: the op
    would compute the norm a second time.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`; nodes that lost their readers are removed."""
        norms = {id(norm.output): norm for norm in find_norms(model)}
        modified = False
        for node in list(model.graph):
            value = _quantized_value(node)
            if value is None:
                continue
            norm = norms.get(id(value))
            if _has_one_reader(value):
                modified |= _fuse_silu(node, value) if norm is None else _fuse_norm(node, value, norm)
            elif norm is not None:
                logger.info("%s: not fused with its norm: other nodes read the float values", node.name)
        return ir.passes.PassResult(model, modified)


def _quantized_value(node: ir.Node) -> ir.Value | None:
    """Return the float value that a quantize node with an output type of uint8 reads, before a Cast to float32."""
    if (node.domain, node.op_type) == (DOMAIN, dynamic_quantize_per_token.NAME):
        return node.inputs[0]
    if node.domain or node.op_type != "QuantizeLinear" or len(node.inputs) != 3:
        return None
    scale, zero_point = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype != np.uint8:
        return None
    value = node.inputs[0]
    cast = None if value is None else value.producer()
    if cast is not None and cast.op_type == "Cast" and _has_one_reader(value):
        return cast.inputs[0]
    return value


def _has_one_reader(value: ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether types and shapes are known and equal, so that nothing broadcasts."""
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    if a.dtype not in FLOATS or a.dtype != b.dtype or len(a.shape) != len(b.shape):
        return False
    for one, other in zip(a.shape, b.shape, strict=True):
        if one != other or (isinstance(one, ir.SymbolicDim) and one.value is None):
            return False
    return True


def _fuse_norm(quantize: ir.Node, value: ir.Value, norm: Norm) -> bool:
    node = norm.node
    weight = _weight_input(norm)
    if norm.kind != "rms" or norm.bias is not None or weight is None or weight.dtype not in FLOATS:
        return False
    x, skip, total, place = norm.input, None, None, quantize
    if x is None:  # a Skip operator
        x, skip = node.inputs[0], node.inputs[1]
        if any(node.inputs[3:]) or any(output.uses() for output in node.outputs[1:3]) or not _same_shape(x, skip):
            return False
        total, place = node.outputs[3] if len(node.outputs) > 3 else None, node
    else:
        add = x.producer()
        if add is not None and (add.domain, add.op_type) == ("", "Add") and _same_shape(*add.inputs):
            total, place = x, add
            x, skip = add.inputs
    if x is None or x.dtype != weight.dtype:
        return False
    graph = _graph(quantize)
    fused = rms_norm_quantize(
        x, weight, _target(graph, quantize), epsilon=norm.epsilon, skip=skip, name=f"{value.name}.quantize"
    )
    graph.insert_before(place, fused)
    if skip is not None:
        if total is None:
            fused.outputs[-1].name = f"{value.name}.sum"
        else:
            take_over(fused.outputs[-1], total)
    _replace(quantize, fused)
    _remove_unread([place])
    return True


def _weight_input(norm: Norm) -> ir.Value | None:
    """Return the node's input that is the weight, where it is an initializer itself and not computed from one."""
    return next((value for value in norm.node.inputs if value is norm.weight), None)


def _fuse_silu(quantize: ir.Node, value: ir.Value) -> bool:
    product = value.producer()
    if product is None or (product.domain, product.op_type) != ("", "Mul"):
        return False
    for index in (0, 1):
        activated, up = product.inputs[index], product.inputs[1 - index]
        gate = _silu_input(activated)
        if gate is not None and activated is not None and _has_one_reader(activated) and _same_shape(gate, up):
            assert up is not None
            graph = _graph(quantize)
            fused = silu_mul_quantize(gate, up, _target(graph, quantize), name=f"{value.name}.quantize")
            graph.insert_before(quantize, fused)
            _replace(quantize, fused)
            return True
    return False


def _silu_input(value: ir.Value | None) -> ir.Value | None:
    """Return x where a value is x * sigmoid(x)."""
    node = None if value is None else value.producer()
    if node is None or (node.domain, node.op_type) != ("", "Mul"):
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = None if gate is None else gate.producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x and _has_one_reader(gate):
            return x
    return None


def _target(graph: ir.Graph, quantize: ir.Node) -> StaticTarget | None:
    if quantize.op_type == dynamic_quantize_per_token.NAME:
        return None
    scale, zero_point = quantize.inputs[1], quantize.inputs[2]
    assert scale is not None and zero_point is not None
    if scale.dtype != ir.DataType.FLOAT:
        array = constant_array(scale)
        assert array is not None
        scale = add_constant(graph, f"{scale.name}_float", array.astype(np.float32))
    return StaticTarget(scale, zero_point)


def _replace(quantize: ir.Node, fused: ir.Node) -> None:
    """Hand the outputs of the quantize node over and remove what then has no reader."""
    for old, new in zip(quantize.outputs, fused.outputs, strict=False):
        take_over(new, old)
    _remove_unread([quantize])


def _remove_unread(nodes: Sequence[ir.Node]) -> None:
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        _graph(node).remove(node, safe=True)
        pending += [producer for producer in producers if producer is not None]


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph
