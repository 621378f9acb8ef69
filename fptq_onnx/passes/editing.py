"""The few graph edits that every pass shares: constants, fresh names, replacing a node by others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from fptq_onnx.quantization.packing import pack_int4

__all__ = [
    "add_constant",
    "add_int4_constant",
    "add_lazy_constant",
    "as_numpy",
    "cast",
    "replace_node",
    "take_over",
    "unique_value_name",
]


def unique_value_name(graph: ir.Graph, wanted: str) -> str:
    """Return `wanted`, or `wanted` with a number appended if an initializer of the graph has that name."""
    if wanted not in graph.initializers:
        return wanted
    number = 1
    while f"{wanted}.{number}" in graph.initializers:
        number += 1
    return f"{wanted}.{number}"


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add `array` as an initializer called `name` (made unique) and return its value."""
    name = unique_value_name(graph, name)
    return _register(graph, name, ir.tensor(array, name=name))


def add_int4_constant(graph: ir.Graph, name: str, shape: Sequence[int], compute: Callable[[], np.ndarray]) -> ir.Value:
    """Add an INT4 initializer whose integers, int8 in -8..7, are computed each time somebody reads them."""
    name = unique_value_name(graph, name)

    def evaluate() -> ir.TensorProtocol:
        return ir.PackedTensor(pack_int4(compute()), ir.DataType.INT4, shape=ir.Shape(shape), name=name)

    return _register(graph, name, ir.LazyTensor(evaluate, dtype=ir.DataType.INT4, shape=ir.Shape(shape), name=name))


def add_lazy_constant(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int], compute: Callable[[], np.ndarray]
) -> ir.Value:
    """Add an initializer whose data are computed each time they are read, so that no float copy stays in memory."""
    name = unique_value_name(graph, name)

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(compute(), dtype=dtype.numpy()), dtype=dtype, name=name)

    return _register(graph, name, ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name))


def cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    """Return a Cast node (not yet in a graph) whose output is called `name`."""
    node = ir.node("Cast", [value], {"to": to}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(to)
    node.outputs[0].shape = value.shape
    return node


def replace_node(old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` where `old` is; the output of its last node takes over name, type, shape and readers of `old`'s."""
    graph = old.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"node {old.name} is in no graph")
    before, after = old.outputs[0], new[-1].outputs[0]
    name = before.name
    after.type, after.shape = before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    before.name = None
    after.name = name
    graph.remove(old, safe=True)


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Give the name and the readers of `old` to `new`."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, old.name


def as_numpy(dtype: ir.DataType, value: float) -> np.ndarray:
    """Return `value` as a scalar array of `dtype`."""
    return np.array(value, dtype=dtype.numpy())
