"""Cut a model into a chain of smaller models at the residual stream, so that a change in one costs only what follows.

Whatever reads quantized or float values between two states of the residual stream lies in one segment. A measurement
that quantizes layers of one segment reuses the float states in front of it, and only that segment is built anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from fptq_onnx.graph.blocks import find_blocks
from fptq_onnx.graph.linears import LinearSearch

__all__ = ["Segment", "cut"]

logger = logging.getLogger(__name__)

# Caches for later tokens: no measurement reads them.
_CACHE_OUTPUT = "present"


@dataclass(frozen=True, eq=False)
class Segment:
    """A consecutive part of a model as a model of its own; weights are shared with the whole.

    Attributes:
        index: 0 for what comes before the blocks, then 1, 2, ... in execution order.
        model: Float model from `inputs` to `outputs`.
        inputs: Graph inputs of the whole model, and values that earlier segments compute.
        outputs: Values that later segments read, and graph outputs of the whole model other than cache outputs.
        layers: Node names of its linear layers, in execution order.
    """

    index: int
    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def cut(model: ir.Model, linears: LinearSearch) -> list[Segment]:
    """Cut a model into what comes before its blocks, each block, and the head; run in order they are the model.

    Args:
        model: The model that `linears` was found in; left as it is.
        linears: Result of `find_linears`.

    Returns:
        The segments. A model without blocks, or whose cut values have no known type, is one segment.
    """
    graph = model.graph
    stages = _stages(model, linears)
    inputs: dict[int, dict[ir.Value, None]] = {stage: {} for stage in stages.values()}
    outputs: dict[int, dict[ir.Value, None]] = {stage: {} for stage in stages.values()}
    for node, stage in stages.items():
        for value in _reads(node):
            producer = value.producer()
            if producer is None:
                if value.is_graph_input() and value.graph is graph and value.name not in graph.initializers:
                    inputs[stage][value] = None
            elif producer in stages and stages[producer] != stage:
                inputs[stage][value] = None
                outputs[stages[producer]][value] = None
    for value in graph.outputs:
        producer = value.producer()
        if producer in stages and not (value.name or "").startswith(_CACHE_OUTPUT):
            outputs[stages[producer]][value] = None
    segments: list[Segment] = []
    for stage in sorted(inputs):
        if not outputs[stage]:
            continue
        part = ir.convenience.extract(graph, list(inputs[stage]), list(outputs[stage]))
        names = {node.name for node, own in stages.items() if own == stage}
        segments.append(
            Segment(
                len(segments),
                ir.Model(
                    part,
                    ir_version=model.ir_version,
                    functions=[function.clone() for function in model.functions.values()],
                ),
                tuple(str(value.name) for value in inputs[stage]),
                tuple(str(value.name) for value in outputs[stage]),
                tuple(layer.name for layer in linears.layers if layer.name in names),
            )
        )
    logger.debug("cut the model into %d segments", len(segments))
    return segments


def _stages(model: ir.Model, linears: LinearSearch) -> dict[ir.Node, int]:
    """Number the nodes: 0 before the blocks, 1.. the blocks, then the head; all 0 where no cut is possible."""
    blocks = find_blocks(model, linears)
    stages = {node: block.index + 1 for block in blocks for node in block.nodes}
    head = len(blocks) + 1
    for node in model.graph:
        if node in stages:
            continue
        before = [stages.get(producer, 0) for value in _reads(node) if (producer := value.producer()) is not None]
        stages[node] = head if any(before) else 0
    ordered = {node: stages[node] for node in model.graph}
    for node, stage in ordered.items():
        for value in _reads(node):
            producer = value.producer()
            if producer not in ordered or ordered[producer] == stage:
                continue
            if ordered[producer] > stage or value.type is None:
                logger.warning("%s cannot be cut at %s: it is measured as a whole", model.graph.name, value.name)
                return dict.fromkeys(ordered, 0)
    return ordered


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, those of its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            for inner in graph:
                yield from _reads(inner)
