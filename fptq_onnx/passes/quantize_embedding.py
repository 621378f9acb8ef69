"""Store the embedding table in int8 or int4, in one copy with the vocabulary head where both are the same weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from fptq_onnx.errors import ModelError
from fptq_onnx.graph.constants import constant_array, constant_shape, root_initializer
from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.graph.lookups import token_lookups
from fptq_onnx.passes.editing import add_constant, add_int4_constant, cast, replace_node
from fptq_onnx.quantization.int4 import quantize_weight
from fptq_onnx.quantization.int8 import quantize_int8

__all__ = ["QuantizeEmbeddingPass", "TiedHead", "find_tied_heads"]

logger = logging.getLogger(__name__)

MICROSOFT = "com.microsoft"
# What GatherBlockQuantized demands of a block: a power of two, no smaller.
_SMALLEST_BLOCK = 16
# Float types that GatherBlockQuantized has a CPU kernel for.
_LOOKED_UP = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})


@dataclass(frozen=True)
class TiedHead:
    """A linear layer of the shape of an embedding table.

    Attributes:
        layer: Name of its node, before and after it is replaced.
        label: Of the layer.
        same: Its weight is the table, transposed: equal in every value.
    """

    layer: str
    label: str
    same: bool


@dataclass(frozen=True)
class _Table:
    """A quantized table in the graph.

    Attributes:
        integers: [H, V] int8 or int4 ("columns"); [V, H] int4, or [V, H / block, block / 2] uint8 with two values to a
            byte around 8, as MatMulNBits has them ("rows").
        scale: T [V] for int8, [groups, V] for columns of int4, V x groups in any shape for rows.
        block: Channels per scale; the last group may be short.
        rows: Which of the two.
    """

    integers: ir.Value
    scale: ir.Value
    block: int
    rows: bool


def find_tied_heads(model: ir.Model) -> dict[str, TiedHead]:
    """Find the layer that each embedding table could share its integers with, before linear layers are replaced.

    Returns:
        By name of the lookup: of the layers with as many inputs as the table has columns and as many outputs as it has
        rows, one that holds the same weights, else the last. Lookups without such a layer are absent.
    """
    found: dict[str, TiedHead] = {}
    layers = find_linears(model).layers
    for lookup in token_lookups(model.graph):
        shape = _shape(lookup)
        matching = [layer for layer in layers if (layer.n, layer.k) == shape]
        table = constant_array(lookup.inputs[0]) if matching else None
        for layer in matching:
            assert table is not None
            found[str(lookup.name)] = TiedHead(layer.name, layer.label, _holds(layer, table))
            if found[str(lookup.name)].same:
                break
    return found


class QuantizeEmbeddingPass(ir.passes.InPlacePass):
    """Gather(table, ids) -> rows of integers times their scales. Run it when the layers are replaced.

    A table in the layout of the head's weight, [hidden, vocabulary], is turned into rows of int8 in front of the lookup
    by standard operators that read constants only: onnxruntime runs them once, at session creation, and keeps their
    result (one byte per value, also of an int4 table: ONNX has no Gather for int4). Gather along the vocabulary itself
    would need no copy, but a token's values lie in as many pages of memory as the model has channels: 512 tokens of
    SmolLM2 took 13 to 25 ms of a prefill of 400. onnxruntime's GatherBlockQuantized reads int4 itself, but only rows:
    its CUDA kernel counts blocks along the last axis whatever `quantize_axis` says, and its CPU kernel takes 8 times as
    long as Gather for columns. So int4 rows are written where no head of ours has the same integers.

    Args:
        method: "int8", a scale per token; or "int4", a scale per group of a token's channels, with the clip range of
            least squared error (the rows themselves are the output, so nothing else weighs the error).
        group_size: Channels per scale of a table that has its own; "channel" is one scale per token.
        standard: Use standard operators only.
        heads: From `find_tied_heads`; nothing is shared without.

    Attributes:
        outcome: What was done, or why not, for the report.
    """

    def __init__(
        self,
        method: Literal["int8", "int4"] = "int8",
        *,
        group_size: int | Literal["channel"] = 128,
        standard: bool = False,
        heads: Mapping[str, TiedHead] | None = None,
    ) -> None:
        """Nothing is computed before the pass runs."""
        self._method, self._group_size, self._standard, self._heads = method, group_size, standard, dict(heads or {})
        self.outcome = "float: no token ids are looked up in a constant table"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`; ModelError for a table that holds NaN or Inf."""
        graph = model.graph
        modified = False
        for lookup in token_lookups(graph):
            ids, output = lookup.inputs[1], lookup.outputs[0]
            found = root_initializer(lookup.inputs[0])
            assert ids is not None and found is not None
            dtype = output.dtype or found[0].dtype
            if dtype is None:
                self.outcome = f"float: the type of {lookup.name} is not known"
                logger.warning("embedding %s: %s", lookup.name, self.outcome)
                continue
            table = self._of_head(graph, lookup) or self._own(graph, lookup, dtype)
            build = _gather_rows if table.rows else _gather_columns
            replace_node(lookup, list(build(graph, str(lookup.name), table, ids, dtype)))
            if table.rows:
                model.graph.opset_imports.setdefault(MICROSOFT, 1)
            modified = True
            logger.info("embedding %s: %s", lookup.name, self.outcome)
        return ir.passes.PassResult(model, modified)

    def _of_head(self, graph: ir.Graph, lookup: ir.Node) -> _Table | None:
        """The table of a head with the same weights; None, with the reason in `outcome`, if none can be shared."""
        self.outcome = self._method
        head = self._heads.get(str(lookup.name))
        if head is None:
            return None
        if not head.same:
            self.outcome += f", a table of its own: {head.label} has other weights (untied, or equalized)"
            return None
        node = next(node for node in graph if node.name == head.layer)
        table, stored = _weight_of(node)
        if stored != self._method:
            self.outcome += f", a table of its own: {head.label} is {stored}"
            return None
        if table is not None and table.rows and table.integers.shape is not None:
            padded = int(np.prod(table.integers.shape.numpy()[1:])) * 2
            width = _shape(lookup)[1]
            if padded != width:
                self.outcome += f", a table of its own: {head.label} fills up {width} channels to {padded}"
                return None
        self.outcome += ", one table with the head"
        return table

    def _own(self, graph: ir.Graph, lookup: ir.Node, dtype: ir.DataType) -> _Table:
        table = constant_array(lookup.inputs[0])
        assert table is not None
        name, width = lookup.name, table.shape[1]
        columns = np.ascontiguousarray(table.T, dtype=np.float32)
        if not np.isfinite(columns).all():
            raise ModelError(f"embedding table of {name}", "it holds NaN or Inf", "Repair or re-export the model")
        if self._method == "int8":
            weight = quantize_int8(columns, dtype.numpy())
            integers = add_constant(graph, f"{name}.table_int8", weight.q)
            return _Table(integers, add_constant(graph, f"{name}.table_scale", weight.scale), width, rows=False)
        block = width if self._group_size == "channel" else min(self._group_size, width)
        whole = _largest_block(width, block)
        rows = not self._standard and whole > 0
        kept = dtype if not rows or dtype in _LOOKED_UP else ir.DataType.FLOAT
        block = whole if rows else block
        quantized = quantize_weight(columns, block, "mse_clip", kept.numpy())
        q, scale = (quantized.q.T, quantized.scale.T) if rows else (quantized.q, quantized.scale)
        return _Table(
            add_int4_constant(graph, f"{name}.table_int4", q.shape, lambda: q),
            add_constant(graph, f"{name}.table_scale", np.ascontiguousarray(scale)),
            block,
            rows,
        )


def _holds(layer: LinearLayer, table: np.ndarray) -> bool:
    """Whether the weight of a layer is a table transposed; views, no copies."""
    weight = constant_array(layer.node.inputs[1])
    assert weight is not None
    if layer.node.attributes.get_float("alpha", 1.0) != 1.0:
        return False
    return np.array_equal(weight if layer.node.attributes.get_int("transB", 0) else weight.T, table)


def _shape(lookup: ir.Node) -> tuple[int, ...]:
    """Rows and columns of the table of a lookup, without reading it."""
    found = root_initializer(lookup.inputs[0])
    assert found is not None
    return constant_shape(*found)


def _largest_block(width: int, most: int) -> int:
    """Largest block of GatherBlockQuantized, up to `most`, that divides a width; 0 if there is none."""
    block = width & -width  # the largest power of two in it
    while block > most:
        block //= 2
    return block if block >= _SMALLEST_BLOCK else 0


def _weight_of(node: ir.Node) -> tuple[_Table | None, str]:
    """The integers of a replaced layer and what they are called in a recipe; "float" if it has none."""
    dequantize = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
    if node.op_type in ("W8A8MatMul", "W4A8MatMul", "DynamicQuantizeW4A8MatMul"):
        (integers, scale), block = node.inputs[-2:], node.attributes.get_int("block_size", 0)
    elif node.op_type == "MatMulNBits":
        (integers, scale), block = node.inputs[1:3], node.attributes.get_int("block_size", 0)
    elif dequantize is not None and dequantize.op_type == "DequantizeLinear":
        (integers, scale), block = dequantize.inputs[:2], dequantize.attributes.get_int("block_size", 0)
    else:
        return None, "float"
    assert integers is not None and scale is not None
    stored = "int8" if integers.dtype == ir.DataType.INT8 else "int4"
    return _Table(integers, scale, block, rows=node.op_type == "MatMulNBits"), stored


def _gather_columns(graph: ir.Graph, name: str, table: _Table, ids: ir.Value, dtype: ir.DataType) -> Iterator[ir.Node]:
    """Columns of [hidden, vocabulary] for ids [...]: [..., hidden] in float times the scale."""
    integers, scale = table.integers, table.scale
    grouped = scale.shape is not None and len(scale.shape) == 2
    if grouped:
        as_bytes = cast(integers, ir.DataType.INT8, f"{name}.table_int8")
        yield as_bytes
        integers = as_bytes.outputs[0]
        turned = _transposed(scale, f"{name}.scale_rows")
        yield turned
        scale = turned.outputs[0]
    rows = _transposed(integers, f"{name}.table_rows")
    yield rows
    gathered = ir.node("Gather", [rows.outputs[0], ids], {"axis": 0}, name=f"{name}.row")
    yield gathered
    digits = cast(gathered.outputs[0], ir.DataType.FLOAT, f"{name}.digits")
    yield digits
    scales = ir.node("Gather", [scale, ids], {"axis": 0}, name=f"{name}.scales")
    yield scales
    factors = scales.outputs[0]
    if dtype != ir.DataType.FLOAT or table.scale.dtype != ir.DataType.FLOAT:
        wide = cast(factors, ir.DataType.FLOAT, f"{name}.scales_float")
        yield wide
        factors = wide.outputs[0]
    if not grouped:
        axis = ir.node("Constant", [], {"value": ir.tensor(np.array([-1], np.int64))}, name=f"{name}.last_axis")
        yield axis
        column = ir.node("Unsqueeze", [factors, axis.outputs[0]], name=f"{name}.scale_column")
        yield column
        factors = column.outputs[0]
    elif table.scale.shape is not None and table.scale.shape.numpy()[0] > 1:
        assert table.integers.shape is not None
        groups = np.arange(table.integers.shape.numpy()[0], dtype=np.int64) // table.block
        group = add_constant(graph, f"{name}.group_of_channel", groups)
        spread = ir.node("Gather", [factors, group], {"axis": -1}, name=f"{name}.scale_channels")
        yield spread
        factors = spread.outputs[0]
    product = ir.node("Mul", [digits.outputs[0], factors], name=f"{name}.dequantize")
    yield product
    if dtype != ir.DataType.FLOAT:
        yield cast(product.outputs[0], dtype, f"{name}.cast")


def _transposed(matrix: ir.Value, name: str) -> ir.Node:
    node = ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=name)
    node.outputs[0].name, node.outputs[0].type = name, matrix.type
    if matrix.shape is not None:
        node.outputs[0].shape = ir.Shape(matrix.shape.numpy()[::-1])
    return node


def _gather_rows(graph: ir.Graph, name: str, table: _Table, ids: ir.Value, dtype: ir.DataType) -> Iterator[ir.Node]:
    """Rows of [vocabulary, hidden], or of [vocabulary, groups, group] as MatMulNBits stores them."""
    assert table.integers.shape is not None
    stored = table.integers.shape.numpy()
    in_groups, scale, looked_up = len(stored) == 3, table.scale, table.scale.dtype
    if in_groups:
        if looked_up not in _LOOKED_UP:
            wide = cast(scale, ir.DataType.FLOAT, f"{name}.scales_float")
            yield wide
            scale, looked_up = wide.outputs[0], ir.DataType.FLOAT
        target = add_constant(graph, f"{name}.scale_shape", np.array([*stored[:2], 1], np.int64))
        shaped = ir.node("Reshape", [scale, target], name=f"{name}.scales")
        yield shaped
        scale = shaped.outputs[0]
    attributes = {"gather_axis": 0, "quantize_axis": len(stored) - 1, "block_size": table.block}
    lookup = ir.node(
        "GatherBlockQuantized", [table.integers, ids, scale], attributes, domain=MICROSOFT, name=f"{name}.row"
    )
    yield lookup
    found = lookup.outputs[0]
    if in_groups:
        tokens = ir.node("Shape", [ids], name=f"{name}.tokens")
        yield tokens
        width = add_constant(graph, f"{name}.width", np.array([stored[1] * table.block], np.int64))
        target_shape = ir.node("Concat", [tokens.outputs[0], width], {"axis": 0}, name=f"{name}.row_shape")
        yield target_shape
        joined = ir.node("Reshape", [found, target_shape.outputs[0]], name=f"{name}.channels")
        yield joined
        found = joined.outputs[0]
    if looked_up != dtype:
        yield cast(found, dtype, f"{name}.cast")
