"""Cut a model into a chain of smaller models at the residual stream, so that a change in one costs only what follows.

A measurement that quantizes layers of one link reuses the float states in front of it, and builds only that link anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import onnx_ir as ir

from fptq_onnx.graph.linears import LinearSearch
from fptq_onnx.graph.segments import extract_segment, find_segments, whole

__all__ = ["Link", "cut"]

logger = logging.getLogger(__name__)

# Caches for later tokens: no measurement reads them.
_CACHE_OUTPUT = "present"


@dataclass(frozen=True, eq=False)
class Link:
    """A segment of a model as a model of its own; weights are shared with the whole.

    Attributes:
        index: Position in the order of execution: the embedding, the blocks, the head.
        model: Float model from `inputs` to `outputs`.
        inputs: Graph inputs of the whole model, and values that earlier links compute.
        outputs: Values that later links read, and graph outputs of the whole model other than cache outputs.
        layers: Node names of its linear layers, in execution order.
    """

    index: int
    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def cut(model: ir.Model, linears: LinearSearch) -> list[Link]:
    """Cut a model into what comes before its blocks, each block, and the head; run in order they are the model.

    Args:
        model: The model that `linears` was found in; left as it is.
        linears: Result of `find_linears`.

    Returns:
        The links. A model that cannot be cut, or whose cut values have no known type, is one link.
    """
    segments = find_segments(model, linears)
    untyped = [value.name for segment in segments for value in segment.inputs if value.type is None]
    if untyped:
        segments = whole(model, f"the type of {untyped[0]} is not known")
    if segments.refused is not None:
        logger.warning("the model is measured as a whole: %s", segments.refused)
    links = []
    for segment in segments:
        part = extract_segment(model, segment, ())
        part.graph.outputs[:] = [v for v in part.graph.outputs if not str(v.name).startswith(_CACHE_OUTPUT)]
        names = {node.name for node in segment.nodes}
        links.append(
            Link(
                segment.index,
                part,
                tuple(str(v.name) for v in part.graph.inputs if v.name not in part.graph.initializers),
                tuple(str(value.name) for value in part.graph.outputs),
                tuple(layer.name for layer in linears.layers if layer.name in names),
            )
        )
    return links
