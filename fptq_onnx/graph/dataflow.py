"""For every value of a graph: which linear layers, residual stream or attention it was last computed from.

One pass in execution order. Each value carries its *origins*: the linear layers, residual-stream states and attention
outputs met last on the way back, each with a flag that says whether a non-linear operation lies in between. Roles and
blocks are read off these origins; names are never looked at.
"""

from __future__ import annotations

__all__ = ["Attention", "Dataflow", "Origin", "Probabilities", "Scores", "Stream", "trace"]

import bisect
import dataclasses
from collections.abc import Mapping, Set

import onnx_ir as ir

from fptq_onnx.graph.constants import constant_shape, root_initializer

# Operators whose first input alone is the data; the others are shapes, axes, indices or tables.
# fmt: off
_FIRST_INPUT = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split", "Identity", "Cast",
    "CastLike", "GatherElements", "GatherND", "Pad", "Tile", "Flatten", "Dropout", "ReduceMean", "ReduceSum",
    "ReduceMax", "TopK", "Clip", "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
    "RotaryEmbedding",
})
# fmt: on
# Operators that only move, select or add up data (beside Mul, Div, Add and Sub with a constant).
# fmt: off
_LINEAR = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split", "Identity", "Cast",
    "CastLike", "Gather", "GatherElements", "GatherND", "Pad", "Tile", "Flatten", "Dropout", "Concat", "Neg",
    "Sum", "Where", "RotaryEmbedding", "ScatterND", "ScatterElements",
})
# fmt: on
_NO_DATA = frozenset({"Shape", "Size", "NonZero", "ConstantOfShape"})
_SKIP_NORMS = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
# fmt: off
_FUSED_ATTENTION = frozenset({
    "Attention", "GroupQueryAttention", "MultiHeadAttention", "SparseAttention", "PagedAttention",
    "PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention",
    "RotaryGroupQueryAttention", "PackedGroupQueryAttention", "PackedRotaryGroupQueryAttention",
})
# fmt: on


@dataclasses.dataclass(frozen=True)
class Stream:
    """A state of the residual stream: the embedding (index 0), then the result of each residual addition."""

    index: int
    value: ir.Value


@dataclasses.dataclass(frozen=True)
class Scores:
    """The product of two activations that is not (yet) weighted values: attention scores."""

    node: ir.Node


@dataclasses.dataclass(frozen=True)
class Probabilities:
    """Softmax of attention scores."""

    scores: ir.Node


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """One attention: the node that weighs the values, and the linear layers behind query, key and value.

    ``node`` is the fused operator, or the MatMul of probabilities and values; ``value_input`` is the index of its
    input that holds the values.
    """

    index: int
    node: ir.Node
    value_input: int
    query: frozenset[ir.Node]
    key: frozenset[ir.Node]
    value: frozenset[ir.Node]
    stream: int | None


Origin = ir.Node | Stream | Scores | Probabilities | Attention
Origins = Mapping[Origin, bool]


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """Result of ``trace``.

    Attributes:
        origins: For every value what it was last computed from; True: a non-linear operation lies in between.
        attentions: Every attention, in execution order.
        streams: Every state of the residual stream, in execution order.
        into_residual: The linear layers whose output is added to the residual stream.
        vocabulary: Rows of the largest embedding table, 0 without one.
    """

    origins: Mapping[ir.Value, Origins]
    attentions: tuple[Attention, ...]
    streams: tuple[Stream, ...]
    into_residual: Set[ir.Node]
    vocabulary: int

    def of(self, value: ir.Value | None) -> Origins:
        """Return the origins of a value; empty for constants and for what is computed from shapes and masks alone."""
        return {} if value is None else self.origins.get(value, {})

    def linears(self, value: ir.Value | None) -> dict[ir.Node, bool]:
        """Return the linear layers among the origins of a value."""
        return {origin: bent for origin, bent in self.of(value).items() if isinstance(origin, ir.Node)}

    def starts(self) -> list[int]:
        """Return the indices of the stream states at which blocks start: those that an attention begins with."""
        return sorted({attention.stream for attention in self.attentions if attention.stream is not None})

    def block_at(self, stream: int | None) -> int | None:
        """Return the index of the block in which a stream state is read; states before the first block count to it."""
        starts = self.starts()
        if stream is None or not starts:
            return None
        return max(bisect.bisect_right(starts, stream) - 1, 0)

    def stream(self, value: ir.Value | None) -> int | None:
        """Return the index of the latest residual-stream state a value was computed from."""
        return max((origin.index for origin in self.of(value) if isinstance(origin, Stream)), default=None)


def trace(graph: ir.Graph, linear_nodes: Set[ir.Node]) -> Dataflow:
    """Trace the origins of every value of the main graph.

    Args:
        graph: The main graph, nodes in execution order.
        linear_nodes: The MatMul and Gemm nodes that are linear layers (activation in input 0).
    """
    return _Tracer(linear_nodes).run(graph)


class _Tracer:
    def __init__(self, linear_nodes: Set[ir.Node]) -> None:
        self.linear_nodes = linear_nodes
        self.origins: dict[ir.Value, Origins] = {}
        self.attentions: list[Attention] = []
        self.streams: list[Stream] = []
        self.into_residual: set[ir.Node] = set()
        self.vocabulary = 0
        self.layer_stream: dict[ir.Node, int | None] = {}

    def run(self, graph: ir.Graph) -> Dataflow:
        for graph_input in graph.inputs:
            # Hidden states or embeddings given from outside; caches have rank 4, masks rank 2 or 4.
            if graph_input.dtype in _FLOATS and graph_input.shape is not None and graph_input.shape.rank() == 3:
                self.new_stream(graph_input)
        for node in graph:
            self.visit(node)
        return Dataflow(self.origins, tuple(self.attentions), tuple(self.streams), self.into_residual, self.vocabulary)

    def of(self, node: ir.Node, index: int) -> Origins:
        if index >= len(node.inputs) or node.inputs[index] is None:
            return {}
        value = node.inputs[index]
        assert value is not None
        return self.origins.get(value, {})

    def set(self, node: ir.Node, origins: Origins) -> None:
        if origins:
            for output in node.outputs:
                self.origins[output] = origins

    def new_stream(self, value: ir.Value) -> None:
        stream = Stream(len(self.streams), value)
        self.streams.append(stream)
        self.origins[value] = {stream: False}

    def visit(self, node: ir.Node) -> None:
        if node in self.linear_nodes:
            streams = [origin.index for origin in self.of(node, 0) if isinstance(origin, Stream)]
            self.layer_stream[node] = max(streams, default=None)
            self.set(node, {node: False})
        elif node.op_type in _NO_DATA:
            return
        elif node.op_type in _FUSED_ATTENTION:
            self.attention(node, [self.of(node, index) for index in range(3)], value_input=2)
        elif node.op_type in _SKIP_NORMS and node.domain == "com.microsoft":
            self.residual(node, [self.of(node, 0), self.of(node, 1)])
        elif node.op_type in ("Add", "Sum"):
            self.add(node)
        elif node.op_type in ("MatMul", "Einsum", "FusedMatMul") and self.of(node, 0) and self.of(node, 1):
            self.product(node)
        elif node.op_type == "Softmax":
            origins = self.of(node, 0)
            scores = [origin.node for origin in origins if isinstance(origin, Scores)]
            self.set(node, {Probabilities(score): True for score in scores} or dict.fromkeys(origins, True))
        elif node.op_type == "Conv" and not self.of(node, 0):
            self.new_stream(node.outputs[0])  # patch embedding of a vision transformer
        elif node.op_type == "Gather" and not self.of(node, 0):
            self.embedding(node)
        else:
            self.other(node)

    def other(self, node: ir.Node) -> None:
        if node.op_type in _FIRST_INPUT or node.op_type == "Gather":
            used = [self.of(node, 0)]
        elif node.op_type == "Where":
            used = [self.of(node, 1), self.of(node, 2)]
        else:
            used = [self.of(node, index) for index in range(len(node.inputs))]
        used = [origins for origins in used if origins]
        linear = node.op_type in _LINEAR
        if node.op_type in ("Mul", "Div", "Sub"):
            # A product with a constant is linear; x * sigmoid(x) is not; gate * up keeps the flag of each factor.
            linear = len(used) < 2 or used[0].keys() != used[1].keys()
        self.set(node, _union(used, bend=not linear))

    def embedding(self, node: ir.Node) -> None:
        found = root_initializer(node.inputs[0])
        if found is None:
            return
        shape = constant_shape(*found)
        if len(shape) == 2 and found[0].dtype in _FLOATS:
            self.vocabulary = max(self.vocabulary, shape[0])
            self.new_stream(node.outputs[0])

    def add(self, node: ir.Node) -> None:
        used = [origins for index in range(len(node.inputs)) if (origins := self.of(node, index))]
        if len(used) < 2 or all(origins.keys() == used[0].keys() for origins in used):
            self.set(node, _union(used, bend=False))  # a bias, or the parts of one activation function or rotation
        elif any(isinstance(origin, Scores) for origins in used for origin in origins):
            merged = _union(used, bend=False)  # position bias on attention scores
            self.set(node, {origin: bent for origin, bent in merged.items() if isinstance(origin, Scores)})
        elif any(all(isinstance(origin, Stream) for origin in origins) for origins in used):
            self.residual(node, used)
        else:
            self.set(node, _union(used, bend=False))

    def residual(self, node: ir.Node, used: list[Origins]) -> None:
        for origins in used:
            self.into_residual.update(origin for origin in origins if isinstance(origin, ir.Node))
        is_add = node.op_type in ("Add", "Sum")
        # Fused skip norms give the normed activation first and the plain sum fourth (absent behind the last block).
        has_sum = not is_add and len(node.outputs) > 3 and bool(node.outputs[3].uses())
        value = node.outputs[3] if has_sum else node.outputs[0]
        self.new_stream(value)
        if not is_add:
            stream = self.streams[-1]
            self.origins[node.outputs[0]] = {stream: True}

    def product(self, node: ir.Node) -> None:
        for side in (0, 1):
            probabilities = [origin for origin in self.of(node, side) if isinstance(origin, Probabilities)]
            if probabilities:
                scores = probabilities[0].scores
                query, key = self.of(scores, 0), self.of(scores, 1)
                self.attention(node, [query, key, self.of(node, 1 - side)], value_input=1 - side)
                return
        self.set(node, {Scores(node): True})

    def attention(self, node: ir.Node, operands: list[Origins], value_input: int) -> None:
        query, key, value = (frozenset(o for o in origins if isinstance(o, ir.Node)) for origins in operands)
        if not key and not value:
            key = value = query  # packed: one operand holds all three
            value_input = 0
        streams = [self.layer_stream.get(layer) for layer in query or value]
        streams += [origin.index for origin in operands[0] if isinstance(origin, Stream)]
        stream = max((index for index in streams if index is not None), default=None)
        attention = Attention(len(self.attentions), node, value_input, query, key, value, stream)
        self.attentions.append(attention)
        self.origins[node.outputs[0]] = {attention: True}


def _union(parts: list[Origins], bend: bool) -> dict[Origin, bool]:
    merged: dict[Origin, bool] = {}
    for part in parts:
        for origin, bent in part.items():
            merged[origin] = merged.get(origin, False) or bent or bend
    return merged


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
