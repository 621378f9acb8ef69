"""Adds nodes to a graph, whatever its opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.errors import CalibrationError

__all__ = ["OLDEST_OPSET", "NodeBuilder"]

# ScatterElements learned to add in opset 16.
OLDEST_OPSET = 16
_PREFIX = "fptq.observe."

Attribute = int | float | str | tuple[int, ...]


class NodeBuilder:
    """Makes uniquely named nodes for one graph; `take` hands over those made since the last call."""

    def __init__(self, graph: ir.Graph) -> None:
        """Build for `graph`, to which constants are added at once and nodes by the caller.

        Raises:
            CalibrationError: The graph's opset is older than 16.
        """
        self._graph = graph
        self._opset = graph.opset_imports.get("", 0)
        if self._opset < OLDEST_OPSET:
            raise CalibrationError(
                "the model",
                f"uses opset {self._opset}, in which activations cannot be observed",
                "Call fptq_onnx.graph.opset.ensure_opset first",
            )
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """Output of a new node of the standard domain."""
        name = self._name()
        output = ir.Value(name=name)
        self._nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    def reduce(self, op_type: str, x: ir.Value, axis: int) -> ir.Value:
        """Reduction of `x` over one axis, which is dropped (Reduce* take axes as an input from opset 18 on)."""
        if self._opset >= 18:
            return self.op(op_type, x, self.constant(np.array([axis], np.int64)), keepdims=0)
        return self.op(op_type, x, axes=(axis,), keepdims=0)

    def constant(self, array: npt.NDArray[Any] | np.generic) -> ir.Value:
        """Initializer holding `array`; equal constants share one."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._name()
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.Tensor(array, name=name),
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def take(self) -> list[ir.Node]:
        """Nodes made since the last call, in data-flow order; the caller inserts them into the graph."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def _name(self) -> str:
        self._count += 1
        return f"{_PREFIX}{self._count}"
