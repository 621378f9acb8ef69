"""Cut a transformer into its blocks at the residual stream."""

from __future__ import annotations

__all__ = ["Block", "block_boundaries", "find_blocks", "number_stages"]

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from fptq_onnx.graph.linears import LinearLayer, LinearSearch


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One decoder or encoder block: attention and feed-forward between two states of the residual stream.

    Attributes:
        index: 0, 1, ... in execution order; equal to ``LinearLayer.block`` of its layers.
        layers: Its linear layers in execution order.
        nodes: The nodes that compute ``outputs`` from ``inputs``, in execution order.
        inputs: What it reads of the hidden states computed before it: the residual stream, and with fused skip norms
            the normed stream, which the same node gives. Everything else it reads (mask, positions, caches, weights)
            does not depend on hidden states.
        outputs: What later nodes, or the graph's outputs, read of it (cache outputs included).
    """

    index: int
    layers: tuple[LinearLayer, ...]
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def find_blocks(model: ir.Model, linears: LinearSearch) -> list[Block]:
    """Cut the main graph at the residual-stream state that each attention starts from.

    The node that computes a state (a residual Add or a fused skip norm) belongs to the block before it. Nodes before
    the first block compute the embedding; nodes that read the state behind the last block belong to the head.

    Args:
        model: The model ``linears`` was found in.
        linears: Result of ``find_linears``.

    Returns:
        The blocks in execution order; empty when the graph has no attention.
    """
    boundaries = block_boundaries(linears)
    stages = number_stages(model.graph, boundaries)
    blocks = []
    for index, start in enumerate(boundaries[: len(linears.flow.starts())]):
        nodes = tuple(node for node, stage in stages.items() if stage == index)
        inside = set(nodes)
        read = dict.fromkeys(operand for node in nodes for operand in node.inputs if operand is not None)
        inputs = tuple(
            operand
            for operand in read
            if operand is start or ((producer := operand.producer()) in stages and producer not in inside)
        )
        outputs = tuple(
            output
            for node in nodes
            for output in node.outputs
            if output.is_graph_output() or any(use.node not in inside for use in output.uses())
        )
        layers = tuple(layer for layer in linears.layers if layer.node in inside)
        blocks.append(Block(index, layers, nodes, inputs, outputs))
    return blocks


def block_boundaries(linears: LinearSearch) -> list[ir.Value]:
    """The states of the residual stream that each block starts from, and the one that the head starts from."""
    states = {stream.index: stream.value for stream in linears.flow.streams}
    starts = [states[index] for index in linears.flow.starts()]
    if not starts:
        return []
    last = states[max(states)]  # behind the last residual addition comes the head
    return starts if last is starts[-1] else [*starts, last]


def number_stages(graph: ir.Graph, starts: Sequence[ir.Value]) -> dict[ir.Node, int]:
    """Number the nodes that depend on hidden states: those of block i by i, -1 before, the head by the last start."""
    begins = {start.producer(): index for index, start in enumerate(starts)}
    reached = {start: index for index, start in enumerate(starts) if start.producer() is None}
    stages: dict[ir.Node, int] = {}
    for node in graph:
        before = [reached[operand] for operand in node.inputs if operand in reached]
        if before:
            stages[node] = max(before)
        elif node in begins:
            stages[node] = -1
        if node in stages:
            for output in node.outputs:
                reached[output] = begins.get(node, stages[node])
    return stages
