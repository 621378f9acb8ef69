"""What each linear layer is for (query, key, gate, ...), read from the topology of the graph."""

from __future__ import annotations

__all__ = ["Role", "RoleAssignment", "assign_roles"]

import enum
from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir

from fptq_onnx.graph.dataflow import Attention, Dataflow


class Role(enum.StrEnum):
    """The part a linear layer plays in a transformer."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's name for the output projection
    KV = "kv"
    QKV = "qkv"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"
    FC1 = "fc1"
    FC2 = "fc2"
    LM_HEAD = "lm_head"
    OTHER = "other"


class RoleAssignment(NamedTuple):
    """Role and block index (None outside the blocks) of one linear layer."""

    role: Role
    block: int | None


def assign_roles(
    graph: ir.Graph, flow: Dataflow, sizes: Mapping[ir.Node, tuple[int, int]]
) -> dict[ir.Node, RoleAssignment]:
    """Give every linear layer its role and block.

    Args:
        graph: The main graph.
        flow: Its data flow, traced with the nodes of ``sizes`` as linear layers.
        sizes: K and N of every linear layer, in execution order.

    Returns:
        One assignment per key of ``sizes``. Attention gives q, k, v, qkv and o; two layers joined by an elementwise
        product, one of them behind an activation function, are gate and up, and the layer that reads the product and
        feeds the residual stream is down; without the product they are fc1 and fc2; the layer that reaches a graph
        output with one column per vocabulary entry is lm_head. Blocks are counted by attention.
    """
    roles: dict[ir.Node, Role] = {}
    for layer in sizes:
        if any(isinstance(origin, Attention) for origin in flow.of(layer.inputs[0])):
            roles[layer] = Role.O
    for attention in flow.attentions:
        for layer in attention.query | attention.key | attention.value:
            roles.setdefault(layer, _projection(layer, attention))
    _assign_lm_head(graph, flow, sizes, roles)
    for layer in sizes:
        if layer not in roles and layer in flow.into_residual:
            _assign_feed_forward(layer, flow, sizes, roles)
    return {
        layer: RoleAssignment(role, _block(layer, role, flow))
        for layer in sizes
        for role in [roles.get(layer, Role.OTHER)]
    }


def _projection(layer: ir.Node, attention: Attention) -> Role:
    in_query, in_key, in_value = (layer in part for part in (attention.query, attention.key, attention.value))
    if in_query and (in_key or in_value):
        return Role.QKV
    if in_query:
        return Role.Q
    if in_key and in_value:
        return Role.KV
    return Role.K if in_key else Role.V


def _assign_lm_head(
    graph: ir.Graph, flow: Dataflow, sizes: Mapping[ir.Node, tuple[int, int]], roles: dict[ir.Node, Role]
) -> None:
    for output in graph.outputs:
        for layer in flow.linears(output):
            k, n = sizes[layer]
            # A pooler or a classifier reaches an output too, but maps to the hidden size or to a few labels.
            if layer not in roles and (n == flow.vocabulary or (output.name == "logits" and n > k)):
                roles[layer] = Role.LM_HEAD


def _assign_feed_forward(
    last: ir.Node, flow: Dataflow, sizes: Mapping[ir.Node, tuple[int, int]], roles: dict[ir.Node, Role]
) -> None:
    origins = flow.linears(last.inputs[0])
    if len(origins) != len(flow.of(last.inputs[0])) or any(layer in roles for layer in origins):
        return
    if len(origins) == 2:
        order = list(sizes)
        # The factor behind the activation function is the gate; if both or none are, the first to run.
        gate, up = sorted(origins, key=lambda layer: (not origins[layer], order.index(layer)))
        roles.update({gate: Role.GATE, up: Role.UP, last: Role.DOWN})
    elif len(origins) == 1:
        (first, bent), inner = next(iter(origins.items())), sizes[last][0]
        if bent and sizes[first][1] == inner:
            roles.update({first: Role.FC1, last: Role.FC2})
        elif bent and sizes[first][1] == 2 * inner:
            roles.update({first: Role.GATE_UP, last: Role.DOWN})


def _block(layer: ir.Node, role: Role, flow: Dataflow) -> int | None:
    """A layer belongs to the block whose attention it serves, or to the one in which its input stream state is read."""
    if role in (Role.LM_HEAD, Role.OTHER):
        return None
    for attention in flow.attentions:
        if layer in attention.query | attention.key | attention.value or attention in flow.of(layer.inputs[0]):
            return flow.block_at(attention.stream)
    first = next(iter(flow.linears(layer.inputs[0])), layer)  # down and fc2 follow gate, up and fc1
    return flow.block_at(flow.stream(first.inputs[0]))
