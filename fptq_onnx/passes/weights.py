"""Replace constants that nodes read by functions of them, computed when somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.constants import constant_shape, evaluate_path, root_initializer
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.passes.editing import add_lazy_constant

__all__ = ["replace_constant", "replace_weight", "shift_bias"]

Float32 = npt.NDArray[np.float32]
Transform = Callable[[Float32], npt.NDArray[Any]]


def replace_weight(graph: ir.Graph, layer: LinearLayer, suffix: str, transform: Transform) -> None:
    """Give a layer the weight ``transform(W)``, W float32 [K, N] as MatMul wants it; Gemm's transB and alpha go in."""
    transposed = bool(layer.node.attributes.get_int("transB", 0))
    alpha = np.float32(layer.node.attributes.get_float("alpha", 1.0))

    def of_matmul(array: Float32) -> npt.NDArray[Any]:
        return transform((array.T if transposed else array) * alpha)

    if layer.node.op_type == "Gemm":
        layer.node.attributes["transB"] = ir.AttrInt64("transB", 0)
        layer.node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
    replace_constant(graph, layer.node, 1, suffix, of_matmul, (layer.k, layer.n))


def replace_constant(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    suffix: str,
    transform: Transform,
    shape: Sequence[int] | None = None,
) -> ir.Value:
    """Let a node input read ``transform(constant)`` instead of the constant; other readers keep what they have.

    Args:
        graph: The graph of the node.
        node: The reader.
        index: Which input of it; a constant as ``root_initializer`` finds it.
        suffix: Appended to the initializer's name.
        transform: Takes the constant in float32. The result is rounded to the type that the node reads.
        shape: Shape of the result where it is another than the constant's.

    Returns:
        The new initializer.
    """
    operand = node.inputs[index]
    found = root_initializer(operand)
    assert operand is not None and found is not None
    root, path = found
    tensor = root.const_value
    assert tensor is not None
    casts = [ir.DataType(step.attributes["to"].as_int()) for step in path if step.op_type == "Cast"]
    dtype = operand.dtype or (casts[-1] if casts else tensor.dtype)

    def compute() -> npt.NDArray[Any]:
        return transform(evaluate_path(tensor.numpy(), path).astype(np.float32))

    new_shape = constant_shape(root, path) if shape is None else shape
    value = add_lazy_constant(graph, f"{root.name}.{suffix}", dtype, new_shape, compute)
    node.replace_input_with(index, value)
    for step in reversed(path):
        if not step.outputs[0].uses() and not step.outputs[0].is_graph_output():
            graph.remove(step, safe=True)
    if root.name is not None and root.name in graph.initializers and not root.uses() and not root.is_graph_output():
        del graph.initializers[root.name]
    return value


def shift_bias(graph: ir.Graph, layer: LinearLayer, shift: Float32) -> bool:
    """Add ``shift``, float32 [N], to the bias of a layer; False, and nothing done, if it has none."""
    if layer.bias is None:
        return False
    if layer.bias_node is not None:
        node, step = layer.bias_node, shift
        index = next(i for i, value in enumerate(node.inputs) if root_initializer(value) is not None)
    else:
        node, index = layer.node, 2
        beta = layer.node.attributes.get_float("beta", 1.0)
        if beta == 0:
            return False
        step = shift / np.float32(beta)
    replace_constant(graph, node, index, "corrected", lambda bias: bias.reshape(-1) + step, (layer.n,))
    return True
