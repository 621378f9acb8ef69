"""Builds the observation copy of a model: the original outputs gone, the reductions of all observers in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from fptq_onnx.calibration.nodes import NodeBuilder
from fptq_onnx.calibration.observers import Observer, TokenGroup
from fptq_onnx.errors import CalibrationError

__all__ = ["SELECTION_PREFIX", "Observation", "build_observation", "find_value", "insert_after", "replace_outputs"]

SELECTION_PREFIX = "fptq.observe.tokens."

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Observation:
    """A model whose outputs are reductions.

    Attributes:
        model: The observation copy; its weights are shared with the model it was made from.
        outputs: For each observer, the names of its outputs.
        selections: Token groups that need a mask, a bool input [tokens] called SELECTION_PREFIX + group.
    """

    model: ir.Model
    outputs: tuple[tuple[str, ...], ...]
    selections: tuple[TokenGroup, ...]


def build_observation(
    model: ir.Model, observers: Sequence[Observer], *, select_tokens: bool, keep: Sequence[str] = ()
) -> Observation:
    """Copy a model and replace its outputs by the reductions of `observers`; nothing else is left to compute.

    Each reduction follows its activation directly in the graph, which frees the activation early if the session runs
    nodes in graph order.

    Args:
        model: Left as it is.
        observers: What to observe; observers of one value share its conversion to float32 [T, K].
        select_tokens: Whether token masks will be fed. Without them every observer sees all tokens; LEADING and REST
            then are an error.
        keep: Names of values that stay outputs as they are.

    Raises:
        CalibrationError: A value does not exist, is not floating point, or the opset is too old.
    """
    copy = model.clone()
    graph = copy.graph
    nodes = NodeBuilder(graph)
    selections: dict[TokenGroup, ir.Value] = {}
    flattened: dict[tuple[str, TokenGroup], ir.Value] = {}
    position = {node: index for index, node in enumerate(graph)}
    values = {value.name: value for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]}

    insertions: list[tuple[ir.Node | None, list[ir.Node]]] = []

    def tokens_of(name: str, group: TokenGroup) -> ir.Value:
        if (name, group) in flattened:
            return flattened[name, group]
        value = find_value(values, name)
        tokens = nodes.op("Flatten", nodes.op("Cast", value, to=int(ir.DataType.FLOAT)), axis=-1)
        if select_tokens:
            if group not in selections:
                selections[group] = _selection_input(graph, group)
            tokens = _select(nodes, tokens, selections[group], group)
        elif group is not TokenGroup.ALL:
            raise ValueError(f"observing the {group} tokens takes token masks")
        insertions.append((value.producer(), nodes.take()))
        flattened[name, group] = tokens
        return tokens

    outputs: list[ir.Value] = []
    names: list[tuple[str, ...]] = []
    for observer in observers:
        reductions = observer.reduce(nodes, *[tokens_of(name, observer.tokens) for name in observer.values])
        outputs.extend(reductions)
        names.append(tuple(str(value.name) for value in reductions))
        producers = [node for name in observer.values if (node := values[name].producer()) is not None]
        insertions.append((max(producers, key=position.__getitem__, default=None), nodes.take()))
    # From the last to the first, so that additions after one node keep their order.
    for anchor, added in reversed(insertions):
        insert_after(graph, anchor, added)
    replace_outputs(copy, [*(values[name] for name in keep), *outputs])
    return Observation(copy, tuple(names), tuple(selections))


def replace_outputs(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Make `outputs` the outputs of the model, in place, and drop all that is no longer computed for them.

    Outputs of fused attention nodes that are still there stay: GroupQueryAttention infers its present cache to be as
    large as the past, and onnxruntime fails when it then places it in the buffer of an empty past. Graph outputs have
    buffers of their own.
    """
    graph = model.graph
    fused = [
        (node, value) for value in graph.outputs if (node := value.producer()) and node.domain not in ("", "ai.onnx")
    ]
    graph.outputs[:] = outputs
    common_passes.RemoveUnusedNodesPass()(model)
    graph.outputs.extend(value for node, value in fused if node.graph is graph and value not in outputs)


def find_value(values: dict[str | None, ir.Value], name: str) -> ir.Value:
    """The floating-point value of that name.

    Raises:
        CalibrationError: There is none.
    """
    value = values.get(name)
    if value is None:
        raise CalibrationError(
            f"activation {name}",
            "is not a value of the model's main graph",
            "Name an input of one of its linear layers",
        )
    if value.dtype is not None and value.dtype not in _FLOATS:
        raise CalibrationError(
            f"activation {name}", f"has type {value.dtype.name}", "Observe floating-point activations"
        )
    return value


def insert_after(graph: ir.Graph, anchor: ir.Node | None, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes right after `anchor`, or at the beginning of the graph."""
    if anchor is not None:
        graph.insert_after(anchor, nodes)
    elif len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)


def _selection_input(graph: ir.Graph, group: TokenGroup) -> ir.Value:
    mask = ir.Value(
        name=f"{SELECTION_PREFIX}{group}",
        shape=ir.Shape(["fptq_tokens"]),
        type=ir.TensorType(ir.DataType.BOOL),
    )
    graph.inputs.append(mask)
    return mask


def _select(nodes: NodeBuilder, tokens: ir.Value, mask: ir.Value, group: TokenGroup) -> ir.Value:
    """Rows of `tokens` [T, K] where `mask` [B * S] is set; if T is not B * S, all rows, or none for LEADING.

    The sizes are known only when the model runs, so the mask is made to fit there: left whole and expanded to its own
    size if it fits, else cut to one element, made true (false for LEADING), and expanded to T.
    """
    rows = nodes.op("Gather", nodes.op("Shape", tokens), nodes.constant(np.array([0], np.int64)), axis=0)
    size = nodes.op("Shape", mask)
    fits = nodes.op("Equal", rows, size)
    one = nodes.constant(np.array([1], np.int64))
    kept = nodes.op("Slice", mask, nodes.constant(np.array([0], np.int64)), nodes.op("Where", fits, size, one))
    leading = group is TokenGroup.LEADING
    kept = nodes.op("And", kept, fits) if leading else nodes.op("Or", kept, nodes.op("Not", fits))
    return nodes.op("Compress", tokens, nodes.op("Expand", kept, rows), axis=0)
