"""Store the embedding table in int8, in one copy with the vocabulary head where both are the same weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.constants import constant_array, root_initializer
from fptq_onnx.graph.lookups import token_lookups
from fptq_onnx.ops import DOMAIN
from fptq_onnx.passes.editing import add_constant, cast, replace_node
from fptq_onnx.quantization.int8 import Int8Weight, quantize_int8

__all__ = ["QuantizeEmbeddingPass"]

logger = logging.getLogger(__name__)


class QuantizeEmbeddingPass(ir.passes.InPlacePass):
    """Gather(table, ids) -> int8 rows of the table times their scales.

    The table is kept as [hidden, vocabulary] with a scale per token, the layout of an int8 vocabulary head: where the
    model has one with the same integers (tied weights), both read one initializer. Run it when the layers are replaced.

    Attributes:
        outcome: What was done, or why not, for the report.
    """

    def __init__(self) -> None:
        """Nothing is computed before the pass runs."""
        self.outcome = "float: no token ids are looked up in a constant table"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        graph = model.graph
        modified = False
        for lookup in token_lookups(graph):
            ids, output = lookup.inputs[1], lookup.outputs[0]
            table = constant_array(lookup.inputs[0])
            found = root_initializer(lookup.inputs[0])
            assert ids is not None and table is not None and found is not None
            dtype = output.dtype or found[0].dtype
            if ids.shape is None or dtype is None:
                self.outcome = f"float: the shape of the ids or the type of {lookup.name} is not known"
                continue
            weight = quantize_int8(np.ascontiguousarray(table.T, dtype=np.float32), dtype.numpy())
            tied = _tied(graph, weight)
            integers, scale = tied or (
                add_constant(graph, f"{lookup.name}.table_int8", weight.q),
                add_constant(graph, f"{lookup.name}.table_scale", weight.scale),
            )
            replace_node(lookup, list(_rows(str(lookup.name), integers, scale, ids, ids.shape, dtype)))
            self.outcome = "int8, one table with the head" if tied else "int8"
            modified = True
            logger.info("embedding %s: %s", lookup.name, self.outcome)
        return ir.passes.PassResult(model, modified)


def _tied(graph: ir.Graph, weight: Int8Weight) -> tuple[ir.Value, ir.Value] | None:
    """Integers and scales of an int8 layer that has the same ones."""
    for node in graph:
        if node.op_type == "W8A8MatMul" and node.domain == DOMAIN:
            integers, scale = node.inputs[3], node.inputs[4]
        elif node.op_type == "DequantizeLinear" and node.domain == "":
            integers, scale = node.inputs[0], node.inputs[1]
        else:
            continue
        if integers is None or scale is None or integers.const_value is None or scale.const_value is None:
            continue
        if integers.dtype != ir.DataType.INT8 or integers.const_value.shape.numpy() != weight.q.shape:
            continue
        same = np.array_equal(integers.const_value.numpy(), weight.q)
        if same and np.array_equal(scale.const_value.numpy(), weight.scale):
            return integers, scale
    return None


def _rows(
    name: str, integers: ir.Value, scale: ir.Value, ids: ir.Value, shape: ir.Shape, dtype: ir.DataType
) -> Iterator[ir.Node]:
    """Columns of [hidden, vocabulary] for ids [...]: [hidden, ...], then [..., hidden], in float times the scale."""
    rank = len(shape)
    gathered = ir.node("Gather", [integers, ids], {"axis": 1}, name=f"{name}.columns")
    yield gathered
    last = ir.node("Transpose", [gathered.outputs[0]], {"perm": [*range(1, rank + 1), 0]}, name=f"{name}.rows")
    yield last
    digits = cast(last.outputs[0], ir.DataType.FLOAT, f"{name}.digits")
    yield digits
    scales = ir.node("Gather", [scale, ids], {"axis": 0}, name=f"{name}.scales")
    yield scales
    factors = scales.outputs[0]
    if dtype != ir.DataType.FLOAT:
        wide = cast(factors, ir.DataType.FLOAT, f"{name}.scales_float")
        yield wide
        factors = wide.outputs[0]
    axis = ir.node("Constant", [], {"value": ir.tensor(np.array([-1], np.int64))}, name=f"{name}.last_axis")
    yield axis
    column = ir.node("Unsqueeze", [factors, axis.outputs[0]], name=f"{name}.scale_column")
    yield column
    product = ir.node("Mul", [digits.outputs[0], column.outputs[0]], name=f"{name}.dequantize")
    yield product
    if dtype != ir.DataType.FLOAT:
        yield cast(product.outputs[0], dtype, f"{name}.cast")
