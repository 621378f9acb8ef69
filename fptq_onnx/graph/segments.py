"""Cut a model into segments that run one after another, so that the weights of only one have to be in memory."""

from __future__ import annotations

__all__ = ["Segment", "Segmentation", "extract_segment", "find_segments", "segments_between", "whole"]

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import onnx_ir as ir

from fptq_onnx.graph.blocks import block_boundaries, number_stages
from fptq_onnx.graph.linears import LinearLayer, LinearSearch


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The nodes between two states of the residual stream.

    Attributes:
        index: Position in the order of execution.
        label: "embedding", "block 3", "head", or "model" where nothing was cut.
        nodes: Its nodes that depend on hidden states, in execution order; for the first segment all that do not.
        inputs: What it reads of hidden states computed in earlier segments: the residual stream, with fused skip norms
            the normed stream too, and whatever else crosses (a first block's values that all others read). Masks,
            positions and rotary tables do not depend on hidden states and are computed again where they are needed.
        outputs: What later segments read of it.
    """

    index: int
    label: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """All segments of a model, in execution order.

    Attributes:
        segments: One where the model could not be cut.
        boundaries: Names of the values between the segments: the states of the stream that each block starts from.
        refused: Why the model was not cut; None if it was.
    """

    segments: tuple[Segment, ...]
    boundaries: tuple[str, ...] = ()
    refused: str | None = None

    def __iter__(self) -> Iterator[Segment]:
        """Iterate over the segments."""
        return iter(self.segments)

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.segments)

    def of(self, layer: LinearLayer) -> int:
        """Index of the segment in which a layer runs."""
        return self._places.get(layer.node, 0)

    @property
    def description(self) -> str:
        """Into what the model is cut, or why it is not; a clause for the report."""
        count = len(self.segments)
        return f"{count} segments" if self.refused is None else f"not cut into blocks: {self.refused}"

    @cached_property
    def _places(self) -> dict[ir.Node, int]:
        return {node: segment.index for segment in self.segments for node in segment.nodes}


def find_segments(model: ir.Model, linears: LinearSearch) -> Segmentation:
    """Cut a model at the states of the residual stream that its blocks start from.

    Args:
        model: The model ``linears`` was found in. It is not changed.
        linears: Result of ``find_linears``.

    Returns:
        Embedding, blocks and head; one segment with the reason where there are no blocks, or a node with a subgraph
        (If, Loop) or a value that is no tensor stands in the way.
    """
    boundaries = block_boundaries(linears)
    if not boundaries:
        return whole(model, "no attention was found in the graph, so there are no blocks")
    return segments_between(model, boundaries, len(linears.flow.starts()))


def segments_between(model: ir.Model, boundaries: Sequence[ir.Value], blocks: int) -> Segmentation:
    """Cut a model at given values.

    Args:
        model: It is not changed.
        boundaries: States of the stream in execution order; the first ``blocks`` are where blocks start.
        blocks: Number of blocks; what follows the last of them is the head.
    """
    graph = model.graph
    for node in graph:
        if _has_subgraph(node):
            return whole(model, f"the {node.op_type} node {node.name} holds a subgraph, which may read any value")
    stages = number_stages(graph, boundaries)
    count = len(boundaries) + 1
    nodes: list[list[ir.Node]] = [[] for _ in range(count)]
    inputs: list[dict[ir.Value, None]] = [{} for _ in range(count)]
    outputs: list[dict[ir.Value, None]] = [{} for _ in range(count)]
    for node in graph:
        here = stages.get(node, -1) + 1
        nodes[here].append(node)
        if not here:
            continue  # what does not depend on hidden states is computed where it is read
        for operand in node.inputs:
            producer = None if operand is None else operand.producer()
            if operand is None or producer not in stages or stages[producer] + 1 >= here:
                continue
            if not isinstance(operand.type, ir.TensorType | None):
                return whole(model, f"{operand.name}, which is no tensor, crosses a block")
            if operand.dtype == ir.DataType.BFLOAT16:
                return whole(model, f"{operand.name} is bfloat16, which onnxruntime does not hand out as an array")
            inputs[here][operand] = None
            outputs[stages[producer] + 1][operand] = None
    labels = ["embedding", *(f"block {index}" for index in range(blocks)), "head"]
    segments = tuple(
        Segment(index, labels[index], tuple(nodes[index]), tuple(inputs[index]), tuple(outputs[index]))
        for index in range(count)
    )
    return Segmentation(segments, tuple(str(value.name) for value in boundaries))


def whole(model: ir.Model, reason: str | None = None) -> Segmentation:
    """The model as one segment."""
    return Segmentation((Segment(0, "model", tuple(model.graph), (), ()),), refused=reason)


def extract_segment(model: ir.Model, segment: Segment, wanted: Sequence[str]) -> ir.Model:
    """Copy a segment as a model of its own; weights are shared with ``model``.

    Args:
        model: The model that was cut.
        segment: One of its segments.
        wanted: Names of values that the segment computes and that shall be outputs, beside ``segment.outputs``.

    Returns:
        Inputs are the segment's, and those inputs of the model that are needed. Outputs are the segment's, the wanted
        ones, and what the segment computes of the model's.
    """
    graph = model.graph
    if segment.label == "model":
        return model.clone()
    own = {value.name: value for node in segment.nodes for value in node.outputs}
    outputs = dict.fromkeys(
        [
            *segment.outputs,
            *(own[name] for name in wanted if name in own),
            *(value for value in own.values() if segment.index and value.is_graph_output()),
        ]
    )
    inputs = dict.fromkeys([*segment.inputs, *graph.inputs])
    part = ir.convenience.extract(graph, list(inputs), list(outputs))
    part.inputs[:] = [value for value in part.inputs if value.uses() or value.is_graph_output()]
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(part, ir_version=model.ir_version, functions=functions)


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(not attribute.is_ref() and attribute.type in kinds for attribute in node.attributes.values())
