"""The ways from earlier norms and linear layers to an activation along which every channel is only scaled or moved."""

from __future__ import annotations

__all__ = ["Step", "Trail", "check_readers", "find_trails"]

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.channels import Layout, LayoutError, follow
from fptq_onnx.graph.constants import constant_shape, root_initializer
from fptq_onnx.graph.dataflow import Dataflow
from fptq_onnx.graph.norms import FUSED_NORMS

_MAX_STEPS = 64
# Operators through which f(x / s) = f(x) / s for s > 0; the data are input 0.
_PASS = frozenset(
    {"Identity", "Cast", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand"}
    | {"Slice", "Split", "Gather", "Relu"}
)
_SHAPE_READERS = frozenset({"Shape", "Size"})


class Step(NamedTuple):
    """One node on the way: data come in by one input and go on by one output."""

    node: ir.Node
    input_index: int
    output_index: int


class Trail(NamedTuple):
    """The way from the value that a source node gives to the activation, in data-flow order."""

    source: ir.Node
    output: ir.Value
    steps: tuple[Step, ...]


def find_trails(value: ir.Value, linear_nodes: Collection[ir.Node], flow: Dataflow) -> list[Trail]:
    """Walk back from an activation to each norm, vector product or linear layer that it is a linear function of.

    Args:
        value: The activation.
        linear_nodes: Nodes that are linear layers; the walk ends there.
        flow: Data flow of the graph; its attentions are passed through the values.

    Returns:
        One trail, or two where the activation is a product of two others (gate and up).

    Raises:
        LayoutError: There is none; says what is in the way.
    """
    values_of = {attention.node: attention.value_input for attention in flow.attentions}
    return _walk(value, (), linear_nodes, values_of)


def _walk(
    value: ir.Value, steps: tuple[Step, ...], linear_nodes: Collection[ir.Node], values_of: dict[ir.Node, int]
) -> list[Trail]:
    node = value.producer()
    if node is None:
        what = "read from the table" if value.is_initializer() else "the graph input"
        raise LayoutError(f"the activation is {what} {value.name}")
    output_index = next(index for index, output in enumerate(node.outputs) if output is value)

    def through(input_index: int) -> list[Trail]:
        operand = node.inputs[input_index]
        if operand is None or len(steps) == _MAX_STEPS:
            raise LayoutError("the activation is too far from a norm or linear layer")
        return _walk(operand, (Step(node, input_index, output_index), *steps), linear_nodes, values_of)

    if (node.domain, node.op_type) in FUSED_NORMS and output_index > 0:
        raise LayoutError("the activation is the residual stream, which is never scaled")
    if node in linear_nodes or (node.domain, node.op_type) in FUSED_NORMS:
        return [Trail(node, value, steps)]
    if node in values_of:
        return through(values_of[node])
    if node.domain == "" and node.op_type in _PASS:
        return through(0)
    if node.domain == "" and node.op_type in ("Mul", "Add"):
        constant = [index for index, operand in enumerate(node.inputs) if root_initializer(operand) is not None]
        if len(constant) == 1:
            if node.op_type == "Mul" and not _is_scalar(node.inputs[constant[0]]):
                return [Trail(node, value, steps)]
            return through(1 - constant[0])
        if node.op_type == "Add":
            raise LayoutError(f"the activation is a sum of two activations ({node.name})")
        trails: list[Trail] = []
        for side in (1, 0):
            try:
                trails += through(side)
            except LayoutError:
                continue
        if trails:
            return trails
        raise LayoutError(f"neither factor of {node.name} is a linear function of an earlier layer")
    if node.domain == "" and node.op_type == "Concat":
        computed = [i for i, operand in enumerate(node.inputs) if operand is not None and not operand.is_graph_input()]
        if len(computed) == 1:  # new values behind those in the cache
            return through(computed[0])
        raise LayoutError(f"the activation is put together from several ({node.name})")
    raise LayoutError(f"the activation is computed by the {node.op_type} node {node.name}")


def check_readers(
    trail: Trail, layouts: list[Layout], activation_readers: Collection[ir.Node], scaled: np.ndarray
) -> bool:
    """Make sure that nobody but the readers of the activation gets a scaled channel.

    Args:
        trail: The way from the source to the activation.
        layouts: Layout of the source's output, then of the output of each step.
        activation_readers: The linear layers that make up for the scale.
        scaled: Channels of the source's output that are scaled, int64.

    Returns:
        Whether a key-value cache holds scaled values.

    Raises:
        LayoutError: Somebody else reads them, or they are an output of the graph other than a cache that comes back in.
    """
    cached = False
    value = trail.output
    following = [*trail.steps, None]
    for position, (layout, step) in enumerate(zip(layouts, following, strict=True)):
        if position:
            taken = trail.steps[position - 1]
            value = taken.node.outputs[taken.output_index]
            cached |= _fused_cache(taken.node)
        if value.is_graph_output():
            producer = value.producer()
            inputs = producer.inputs if producer is not None and producer.op_type == "Concat" else ()
            if not any(operand is not None and operand.is_graph_input() for operand in inputs):
                raise LayoutError(f"{value.name} is also an output of the graph")
            cached = True
        for node, index in value.uses():
            if step is not None and (node, index) == (step.node, step.input_index):
                continue
            if step is None and _leads_to(node, index, activation_readers):
                continue
            if node.op_type not in _SHAPE_READERS and _gets(node, index, layout, scaled):
                raise LayoutError(f"{value.name} is also read by the {node.op_type} node {node.name}")
    return cached


def _fused_cache(node: ir.Node) -> bool:
    """Whether a fused attention keeps its values in a cache that comes back in; refuse one that only goes out."""
    past = {"GroupQueryAttention": 4, "MultiHeadAttention": 7, "Attention": 5}.get(node.op_type)
    if past is None or len(node.outputs) < 3:
        return False
    present = node.outputs[2]
    if present.uses():
        raise LayoutError(f"{present.name} is also read by others")
    if present.is_graph_output() and (len(node.inputs) <= past or node.inputs[past] is None):
        raise LayoutError(f"{present.name} is also an output of the graph")
    return present.is_graph_output()


def _leads_to(node: ir.Node, index: int, readers: Collection[ir.Node]) -> bool:
    """Whether a use is the activation input of a layer, or an Identity that leads to such only."""
    if node in readers:
        return index == 0
    if node.op_type != "Identity" or node.domain != "" or node.outputs[0].is_graph_output():
        return False
    return all(_leads_to(after, position, readers) for after, position in node.outputs[0].uses())


def _gets(node: ir.Node, index: int, layout: Layout, scaled: np.ndarray) -> bool:
    """Whether a reader off the way gets any scaled channel; one that selects others (a packed query) does not."""
    try:
        outputs = [follow(layout, node, index, output) for output in range(len(node.outputs))]
    except LayoutError:
        return True
    return any(bool(np.isin(output.channels(), scaled).any()) for output in outputs)


def _is_scalar(value: ir.Value | None) -> bool:
    found = root_initializer(value)
    return found is not None and math.prod(constant_shape(*found)) == 1
