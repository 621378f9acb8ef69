"""Find everything that reads from and writes to the residual stream, where a rotation of the stream goes unnoticed."""

from __future__ import annotations

__all__ = ["Reader", "ResidualStream", "RotationRefusedError", "check_own_weight", "find_residual_stream"]

import dataclasses
import enum
import math
from typing import NamedTuple

import onnx_ir as ir

from fptq_onnx.graph.blocks import find_blocks
from fptq_onnx.graph.constants import constant_number, constant_shape, integers, root_initializer
from fptq_onnx.graph.linears import LinearLayer, LinearSearch
from fptq_onnx.graph.norms import FUSED_NORMS, find_norms
from fptq_onnx.graph.producers import Use

_PASS = frozenset({"Identity", "Cast", "Dropout"})
_SHAPE_READERS = frozenset({"Shape", "Size"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"})
# Elementwise functions of one number per token that exporters put between the mean square and the product with it.
_ELEMENTWISE = frozenset(
    {"Identity", "Cast", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Max", "Clip", "Neg", "Abs"}
)


class RotationRefusedError(Exception):
    """The model cannot be rotated without changing what it computes; the message is a clause for the user."""


class Reader(NamedTuple):
    """A linear layer that reads the stream, and the node input that holds the norm weight it sees (None: no weight)."""

    layer: LinearLayer
    scale: Use | None


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream h from block 0 to the head, and every place where its coordinates matter.

    With h Q for h, an orthogonal Q and the norm weights folded into the readers, everything else computes what it
    computed: the only non-linear function of h is the root mean square, which a rotation keeps.

    Attributes:
        hidden: Channels of the stream.
        start: The value that block 0 begins with.
        end: The value behind the last block; for a fused skip norm without an output for the sum its normed output.
        readers: Linear layers that read h / rms(h) * scale.
        writers: Linear layers that are added to the stream.
        constants: Node inputs that hold constants added to the stream: biases, whose last dimension is ``hidden``.
        scales: Node inputs that hold the norm weights of the readers, [hidden].
    """

    hidden: int
    start: ir.Value
    end: ir.Value
    readers: tuple[Reader, ...]
    writers: tuple[LinearLayer, ...]
    constants: tuple[Use, ...]
    scales: tuple[Use, ...]


def find_residual_stream(model: ir.Model, linears: LinearSearch) -> ResidualStream:
    """Follow the residual stream of the main graph through all blocks.

    Args:
        model: The model ``linears`` was found in. It is not changed.
        linears: Result of ``find_linears``.

    Raises:
        RotationRefusedError: Something reads the stream that is no RMS normalization in front of linear layers, or
            something is added to it that is no linear layer's output.
    """
    blocks = find_blocks(model, linears)
    if not blocks or not blocks[0].layers:
        raise RotationRefusedError("no attention was found in the graph, so there are no blocks")
    states = {stream.index: stream.value for stream in linears.flow.streams}
    start, end = states[linears.flow.starts()[0]], states[max(states)]
    if start is end:
        raise RotationRefusedError("nothing is added to the residual stream")
    for value in (start, end):
        if value.shape is not None and value.shape.rank() != 3:
            raise RotationRefusedError(f"the residual stream {value.name} has rank {value.shape.rank()}, not 3")
    walk = _Walk(model, linears, start, end, blocks[0].layers[0].k)
    walk.run()
    layers = dict.fromkeys([*(reader.layer for reader in walk.readers), *walk.writers])
    for layer in layers:
        check_own_weight(layer)
    scales = dict.fromkeys(walk.scales.values())
    return ResidualStream(
        walk.hidden, start, end, tuple(walk.readers), tuple(walk.writers), tuple(walk.constants), tuple(scales)
    )


class _Kind(enum.Enum):
    STREAM = "the residual stream"  # h Q instead of h, or that times one number per token
    SCALED = "the normed residual stream"  # times a vector, so good for nothing but linear layers
    PRODUCT = "squares of the residual stream"  # only their sum over the channels is the same for h Q and h
    TOKEN = "one number per token"  # exactly what it was


class _Walk:
    """One pass in execution order that gives every value derived from the stream its kind."""

    def __init__(self, model: ir.Model, linears: LinearSearch, start: ir.Value, end: ir.Value, hidden: int) -> None:
        self.graph = model.graph
        self.layers = {layer.node: layer for layer in linears.layers}
        self.norm_outputs = {norm.output: norm.node for norm in find_norms(model)}
        self.start, self.end, self.hidden = start, end, hidden
        self.kinds: dict[ir.Value, _Kind] = {}
        self.scales: dict[ir.Value, Use] = {}
        self.readers: list[Reader] = []
        self.writers: list[LinearLayer] = []
        self.constants: list[Use] = []

    def run(self) -> None:
        self.mark(self.start, _Kind.STREAM)
        last = self.end.producer()
        reached = False
        for node in self.graph:
            if any(operand in self.kinds for operand in node.inputs):
                reached |= node is last
                self.visit(node)
        if not reached:
            raise RotationRefusedError(f"{self.end.name}, which the head reads, is not computed from {self.start.name}")

    def kind(self, node: ir.Node, index: int) -> _Kind | None:
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.kinds.get(value)

    def mark(self, value: ir.Value, kind: _Kind, scale: Use | None = None) -> None:
        if value is self.end or (value is not self.start and value.producer() is self.end.producer()):
            return  # the head gets the stream turned back
        self.kinds[value] = kind
        if scale is not None:
            self.scales[value] = scale
        if kind is _Kind.TOKEN:
            return
        if value.is_graph_output():
            raise RotationRefusedError(f"{kind.value} is an output of the graph ({value.name})")
        for node, _ in value.uses():
            if node.graph is not self.graph:
                raise RotationRefusedError(f"{kind.value} ({value.name}) is read inside another node's subgraph")

    def visit(self, node: ir.Node) -> None:
        kinds = [self.kind(node, index) for index in range(len(node.inputs))]
        if node.op_type in _SHAPE_READERS:
            return
        if all(kind in (None, _Kind.TOKEN) for kind in kinds):
            self.visit_token(node, kinds)
        elif node in self.layers:
            self.visit_layer(node, kinds)
        elif (node.domain, node.op_type) in FUSED_NORMS:
            self.visit_norm(node, kinds)
        elif self.hands_on(node):
            self.hand_on(node, 0)
        elif node.domain == "" and node.op_type in _REDUCTIONS:
            self.visit_reduction(node)
        elif (
            node.domain == ""
            and node.op_type == "Pow"
            and kinds[0] is _Kind.STREAM
            and constant_number(node.inputs[1]) == 2
        ):
            self.mark(node.outputs[0], _Kind.PRODUCT)
        elif node.domain == "" and node.op_type in ("Mul", "Div"):
            self.visit_product(node, kinds)
        elif node.domain == "" and node.op_type in ("Add", "Sum"):
            self.visit_sum(node, kinds)
        else:
            raise self.unfit(node)

    def unfit(self, node: ir.Node) -> RotationRefusedError:
        kind = next(kind for operand in node.inputs if operand is not None and (kind := self.kinds.get(operand)))
        return RotationRefusedError(
            f"{kind.value} is read by the {node.op_type} node {node.name}, which a rotation would change"
        )

    def hand_on(self, node: ir.Node, index: int) -> None:
        operand = node.inputs[index]
        assert operand is not None
        self.mark(node.outputs[0], self.kinds[operand], self.scales.get(operand))

    def hands_on(self, node: ir.Node) -> bool:
        """Whether a node gives its first input with the channels as they are; a Reshape, if it keeps the last axis."""
        if node.domain != "" or node.op_type != "Reshape":
            return node.domain == "" and node.op_type in _PASS
        target, recorded = integers(node.inputs[1]), node.outputs[0].shape
        last = target[-1] if target else None
        if last in (None, -1, 0) and recorded is not None and recorded.rank():
            size = recorded[-1]
            last = size if isinstance(size, int) else None
        return last == self.hidden

    def visit_token(self, node: ir.Node, kinds: list[_Kind | None]) -> None:
        """What is computed from one number per token stays as it was; remember where it still is one."""
        if node.domain == "" and node.op_type in _ELEMENTWISE:
            others = [operand for operand, kind in zip(node.inputs, kinds, strict=True) if kind is None]
            if all(operand is None or constant_number(operand) is not None for operand in others):
                self.mark(node.outputs[0], _Kind.TOKEN)

    def visit_layer(self, node: ir.Node, kinds: list[_Kind | None]) -> None:
        layer, activation = self.layers[node], node.inputs[0]
        if kinds[0] not in (_Kind.STREAM, _Kind.SCALED) or layer.k != self.hidden or any(kinds[1:]):
            raise self.unfit(node)
        assert activation is not None
        self.readers.append(Reader(layer, self.scales.get(activation)))

    def visit_norm(self, node: ir.Node, kinds: list[_Kind | None]) -> None:
        kind, weight, _ = FUSED_NORMS[node.domain, node.op_type]
        skip = node.op_type.startswith("Skip")
        if kind == "layer":
            raise RotationRefusedError(
                f"{node.name} is a LayerNorm: it subtracts the mean over the channels, which a rotation does not keep"
            )
        summands = range(2) if skip else range(1)
        if any(kinds[index] for index in range(len(kinds)) if index not in summands):
            raise self.unfit(node)
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if axis != -1 and (shape is None or axis != shape.rank() - 1):
            raise RotationRefusedError(f"{node.name} normalizes over axis {axis}, not over the channels alone")
        if skip:
            for index in (0, 1, 3):  # residual, block output, bias
                if index < len(node.inputs) and node.inputs[index] is not None:
                    self.add(node, index)
            if len(node.outputs) > 3:
                self.mark(node.outputs[3], _Kind.STREAM)
        elif kinds[0] is not _Kind.STREAM:
            raise self.unfit(node)
        if _width(node.inputs[weight]) != self.hidden:
            raise RotationRefusedError(f"the weight of the norm {node.name} is not constant")
        self.mark(node.outputs[0], _Kind.SCALED, Use(node, weight))

    def visit_reduction(self, node: ir.Node) -> None:
        wanted = _Kind.PRODUCT if node.op_type in ("ReduceMean", "ReduceSum") else _Kind.STREAM
        operand = node.inputs[0]
        assert operand is not None
        kind = self.kinds.get(operand)
        if node.op_type == "ReduceMean" and kind is _Kind.STREAM:
            raise RotationRefusedError(
                f"{node.name} takes the mean over the channels, as LayerNorm does, which a rotation does not keep"
            )
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None and "axes" in node.attributes:
            axes = list(node.attributes["axes"].as_ints())
        rank = operand.shape.rank() if operand.shape is not None else 0
        if kind is not wanted or axes is None or axes not in ([-1], [rank - 1]):
            raise self.unfit(node)
        if node.attributes.get_int("keepdims", 1):
            self.mark(node.outputs[0], _Kind.TOKEN)

    def visit_product(self, node: ir.Node, kinds: list[_Kind | None]) -> None:
        if node.op_type == "Mul" and kinds == [_Kind.STREAM, _Kind.STREAM]:
            self.mark(node.outputs[0], _Kind.PRODUCT)
            return
        data = next(index for index in (0, 1) if kinds[index] not in (None, _Kind.TOKEN))
        other = 1 - data
        if node.op_type == "Div" and data == 1:
            raise self.unfit(node)
        if kinds[other] is _Kind.TOKEN or constant_number(node.inputs[other]) is not None:
            self.hand_on(node, data)
        elif node.op_type == "Mul" and kinds[data] is _Kind.STREAM and _width(node.inputs[other]) == self.hidden:
            self.mark(node.outputs[0], _Kind.SCALED, Use(node, other))
        else:
            raise self.unfit(node)

    def visit_sum(self, node: ir.Node, kinds: list[_Kind | None]) -> None:
        if any(kind not in (None, _Kind.STREAM) for kind in kinds):
            raise self.unfit(node)
        for index in range(len(node.inputs)):
            self.add(node, index)
        self.mark(node.outputs[0], _Kind.STREAM)

    def add(self, node: ir.Node, index: int) -> None:
        """Follow what is added to the stream back to linear layers and constants."""
        value = node.inputs[index]
        assert value is not None
        kind = self.kinds.get(value)
        if kind is _Kind.STREAM:
            return
        if kind is not None:
            raise self.unfit(node)
        found = root_initializer(value)
        if found is not None:
            shape = constant_shape(*found)
            if not shape or shape[-1] != self.hidden:
                raise RotationRefusedError(f"{node.name} adds a constant of shape {list(shape)} to the residual stream")
            self.constants.append(Use(node, index))
            return
        if value in self.norm_outputs:
            raise RotationRefusedError(
                f"a block's output is normalized ({self.norm_outputs[value].name}) before it is added to the residual"
                " stream, and the norm's weight does not commute with a rotation"
            )
        source = value.producer()
        if source is None:
            raise RotationRefusedError(f"the graph input {value.name} is added to the residual stream")
        if len(value.uses()) != 1 or value.is_graph_output():
            raise RotationRefusedError(f"{value.name} is added to the residual stream and also read by others")
        if source in self.layers:
            layer = self.layers[source]
            if layer.n != self.hidden:
                raise RotationRefusedError(f"{layer.label} with {layer.n} outputs is added to {self.hidden} channels")
            self.writers.append(layer)
            if source.op_type == "Gemm" and len(source.inputs) > 2 and source.inputs[2] is not None:
                self.add(source, 2)
        elif self.hands_on(source):
            self.add(source, 0)
        elif source.domain == "" and source.op_type in ("Add", "Sum"):
            for operand in range(len(source.inputs)):
                self.add(source, operand)
        elif source.domain == "" and source.op_type in ("Mul", "Div") and constant_number(source.inputs[1]) is not None:
            self.add(source, 0)
        elif source.domain == "" and source.op_type == "Mul" and constant_number(source.inputs[0]) is not None:
            self.add(source, 1)
        else:
            raise RotationRefusedError(
                f"what the {source.op_type} node {source.name} computes is added to the residual stream, and it is not"
                " a linear layer"
            )


def check_own_weight(layer: LinearLayer) -> None:
    """Make sure that a layer's weight has no other reader: with a copy of its own the model would grow.

    Raises:
        RotationRefusedError: It has.
    """
    for value in (layer.weight, *(step.outputs[0] for step in layer.weight_path)):
        if len(value.uses()) != 1 or value.is_graph_output():
            raise RotationRefusedError(f"the weight {layer.weight.name} of {layer.label} is read by other nodes too")


def _width(value: ir.Value | None) -> int | None:
    """The length of a constant vector, with leading dimensions of 1 or without."""
    found = root_initializer(value)
    shape = () if found is None else constant_shape(*found)
    return shape[-1] if shape and shape[-1] == math.prod(shape) else None
