"""What a graph's tables and attention nodes say about its inputs: vocabulary, longest sequence, head size."""

from __future__ import annotations

__all__ = ["TOKEN_NAMES", "attends_in_place", "cache_head_size", "position_limit", "token_lookups", "vocabulary_size"]

from collections.abc import Collection, Iterator

import onnx_ir as ir

from fptq_onnx.graph.constants import root_initializer

# What exporters call the input of token ids.
TOKEN_NAMES = ("input_ids", "token_ids", "tokens")
# Nodes that hand ids on to a table: unchanged, or moved along the table.
_ID_NODES = frozenset({"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Expand", "Add"})
# Nodes that keep the rows of a table; a Transpose swaps them.
_TABLE_NODES = frozenset({"DequantizeLinear", "Cast", "Identity", "Transpose"})
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
# Input that holds the table of cosines, a row per position.
_COSINES = {
    "GroupQueryAttention": 7,
    "RotaryGroupQueryAttention": 7,
    "PackedRotaryGroupQueryAttention": 5,
    "RotaryEmbedding": 2,
}


def vocabulary_size(graph: ir.Graph, token_ids: ir.Value) -> int | None:
    """Rows of the constant table that the token ids are looked up in; None if no such lookup is found."""
    return min((rows for _, source, rows, _ in _tables(graph) if source is token_ids), default=None)


def token_lookups(graph: ir.Graph) -> list[ir.Node]:
    """The Gathers, along axis 0, that look the token ids up in a constant float table [vocabulary, hidden].

    None of a graph that looks them up in integers: its embedding is quantized, and its float tables hold the scales.
    """
    found = []
    for node, source, _, _ in _tables(graph):
        if node.op_type != "Gather" or source.name not in TOKEN_NAMES or not source.is_graph_input():
            continue
        dtype = _table_type(node.inputs[0])
        if dtype is not None and not dtype.is_floating_point():
            return []
        if node.attributes.get_int("axis", 0) == 0 and root_initializer(node.inputs[0]) is not None:
            found.append(node)
    return found


def position_limit(graph: ir.Graph, token_ids: ir.Value) -> int | None:
    """Longest sequence that the position tables allow; None if positions are computed.

    A position table has the width of the token embedding and is looked up by position ids, an input or a constant, so
    by neither token nor segment ids; or it holds the cosines of a fused rotary embedding.
    """
    tables = list(_tables(graph))
    widths = {width for _, source, _, width in tables if source is token_ids}
    limits = [
        rows
        for _, source, rows, width in tables
        if width in widths and (source.const_value is not None or "position" in (source.name or ""))
    ]
    for node in graph:
        index = _COSINES.get(node.op_type)
        table = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if table is not None and table.const_value is not None and len(table.const_value.shape) == 2:
            limits.append(table.const_value.shape.numpy()[0])
    return min(limits, default=None)


def cache_head_size(cache: ir.Value) -> int | None:
    """Last dimension of a cache that declares it by a symbol, as onnxruntime-genai does, from its attention node."""
    for use in cache.uses():
        node = use.node
        if not _is_group_query_attention(node):
            continue
        heads = node.attributes.get_int("num_heads", 0)
        if node.inputs[1] is None or node.op_type.startswith("Packed"):  # the first input holds query, key and value
            heads += 2 * node.attributes.get_int("kv_num_heads", 0)
        width = _width(node.inputs[0])
        if heads and width:
            return width // heads
    return None


def attends_in_place(graph: ir.Graph, caches: Collection[str]) -> bool:
    """Whether all caches are read by GroupQueryAttention alone, whose past and present may be one buffer."""
    uses = [use for value in graph.inputs if value.name in caches for use in value.uses()]
    return bool(uses) and all(_is_group_query_attention(use.node) for use in uses)


def _is_group_query_attention(node: ir.Node) -> bool:
    """Whether a node is onnxruntime's operator or one of the forms of this package's op."""
    return node.op_type.endswith("GroupQueryAttention")


def _tables(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, int, int]]:
    """Each lookup in a constant matrix: the node, the value that its ids come from, the table's entries and width.

    Entries are rows, or columns of a table that is shared with the vocabulary head; MatMulNBits keeps rows in groups of
    bytes with two values each.
    """
    for node in graph:
        axis = node.attributes.get_int("gather_axis", node.attributes.get_int("axis", 0))
        if node.op_type not in _LOOKUPS or axis not in (0, 1) or node.inputs[1] is None:
            continue
        shape = _constant_shape(node.inputs[0])
        if shape is not None and len(shape) == 3 and node.op_type == "GatherBlockQuantized":
            shape = (shape[0], 2 * shape[1] * shape[2])
        if shape is not None and len(shape) == 2:
            yield node, _id_source(node.inputs[1]), shape[axis], shape[1 - axis]


def _id_source(ids: ir.Value) -> ir.Value:
    while (node := ids.producer()) is not None and node.op_type in _ID_NODES and node.inputs[0] is not None:
        ids = node.inputs[0]
    return ids


def _constant_shape(table: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a matrix that is an initializer, or made of one (dequantized, or transposed: a tied lm_head)."""
    transposed = False
    while table is not None:
        if table.const_value is not None:
            shape = tuple(table.const_value.shape.numpy())
            return shape[::-1] if transposed else shape
        node = table.producer()
        if node is None or node.op_type not in _TABLE_NODES:
            return None
        transposed ^= node.op_type == "Transpose"
        table = node.inputs[0]
    return None


def _table_type(table: ir.Value | None) -> ir.DataType | None:
    """Type of a table, also where a file does not say what a Transpose of it gives."""
    while table is not None and table.dtype is None:
        step = table.producer()
        if step is None or step.op_type not in ("Transpose", "Identity"):
            break
        table = step.inputs[0]
    return None if table is None else table.dtype


def _width(value: ir.Value | None) -> int | None:
    """Last dimension of an activation, declared or taken from the weight, bias or scale that makes it."""
    if value is None:
        return None
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("N", 0) or None
    constants = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    return next((array.shape.numpy()[-1] for array in reversed(constants) if len(array.shape)), None)
