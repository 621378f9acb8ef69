"""Find the value heads of every attention: which channels may be mixed between value and output projection."""

from __future__ import annotations

__all__ = ["HeadTarget", "ValueHeads", "find_value_heads"]

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.activation_groups import ActivationGroup, group_by_activation
from fptq_onnx.graph.channels import Layout, LayoutError, channels_of_last, follow, start
from fptq_onnx.graph.constants import root_initializer
from fptq_onnx.graph.linears import LinearLayer, LinearSearch
from fptq_onnx.graph.producers import ScaleSite, ScaleTarget, find_scale_site
from fptq_onnx.graph.residual import RotationRefusedError, check_own_weight
from fptq_onnx.graph.roles import Role
from fptq_onnx.graph.trails import Trail, find_trails

Int64 = npt.NDArray[np.int64]


class HeadTarget(NamedTuple):
    """An initializer that gives the values their channels; ``entries`` int64 [value heads, d] along its axis."""

    target: ScaleTarget
    entries: Int64


@dataclasses.dataclass(frozen=True, eq=False)
class ValueHeads:
    """One attention between its value and its output projection.

    Attention sums tokens with weights that all channels of one head share, so any linear map of a head's channels may
    be applied to the values or, instead, to the sums.

    Attributes:
        source: The linear layer that computes the values (alone, or packed with query and key).
        targets: Its weight and, where there are any, biases: all have the same heads in the same order.
        layers: The linear layers that read the attention's output.
        rows: int64 [query heads, d], rows of the weights of ``layers``; channel i of each belongs to channel i of the
            value head it reads.
        changes_cache: The values in the key-value cache come out mapped too.
    """

    source: LinearLayer
    targets: tuple[HeadTarget, ...]
    layers: tuple[LinearLayer, ...]
    rows: Int64
    changes_cache: bool

    @property
    def head_size(self) -> int:
        """Channels of one head, d."""
        return int(self.rows.shape[1])


def find_value_heads(model: ir.Model, linears: LinearSearch) -> list[ValueHeads]:
    """Find the heads of every attention of the main graph.

    Args:
        model: The model ``linears`` was found in. It is not changed.
        linears: Result of ``find_linears``.

    Raises:
        RotationRefusedError: There is no attention, or one in which something else than the weighted sum over tokens
            lies between the value and the output projection, or reads the values.
    """
    groups = [g for g in group_by_activation(linears.layers) if any(layer.role is Role.O for layer in g.layers)]
    if not groups:
        raise RotationRefusedError("no attention was found in the graph")
    found = []
    for group in groups:
        label = group.layers[0].label
        site = find_scale_site(model, group, linears)
        if site.kind != "linear":
            raise RotationRefusedError(f"the input of {label} is no sum over values: {site.reason}")
        try:
            found.append(_heads(group, site, linears))
        except LayoutError as error:
            raise RotationRefusedError(f"the heads of {label} cannot be told apart: {error}") from error
    return found


def _heads(group: ActivationGroup, site: ScaleSite, linears: LinearSearch) -> ValueHeads:
    layers = {layer.node: layer for layer in linears.layers}
    attentions = {attention.node for attention in linears.flow.attentions}
    trails = find_trails(group.activation, layers.keys(), linears.flow)
    trail = next(trail for trail in trails if trail.source is site.producer)
    source = layers[trail.source]
    _check_steps(trail)
    layouts = [start(source.n, trail.output)]
    for step in trail.steps:
        layouts.append(follow(layouts[-1], *step))
    channels = channels_of_last(layouts[-1], group.k)
    positions = [position for position, step in enumerate(trail.steps) if step.node in attentions]
    if len(positions) != 1:
        raise LayoutError(f"{len(positions)} attentions lie between it and {source.label}")
    heads = _value_heads(trail.steps[positions[0]].node, layouts[positions[0]], layouts[positions[0] + 1])
    for layer in group.layers:
        check_own_weight(layer)
    targets = tuple(HeadTarget(target, _entries(target, channels, heads)) for target in site.targets)
    return ValueHeads(source, targets, group.layers, _rows(channels, heads), site.scales_cache)


def _check_steps(trail: Trail) -> None:
    """What may scale channels one by one (a gate, Relu) does not let them be mixed."""
    for node, input_index, _ in trail.steps:
        gated = node.op_type == "Mul" and root_initializer(node.inputs[1 - input_index]) is None
        if gated or node.op_type == "Relu":
            raise LayoutError(f"the {node.op_type} node {node.name} treats every channel by itself")


def _value_heads(attention: ir.Node, before: Layout, after: Layout) -> Int64:
    """Return the value projection's output channels by head, int64 [value heads, d]."""
    if attention.op_type == "MatMul" or len(before.dims) == 4:  # one head in the last dimension
        first = Layout(before.dims[:-1], before.offset).channels()
        heads: Int64 = first[:, None] + Layout(before.dims[-1:]).channels()
    else:  # fused operators give [batch, sequence, heads * d]
        names = [name for name in ("num_heads", "q_num_heads") if name in attention.attributes]
        sizes = [factor.size for factor in after.dims[-1]]
        if not names or None in sizes:
            raise LayoutError(f"the {attention.op_type} node {attention.name} does not tell its number of heads")
        width = math.prod(size for size in sizes if size is not None)
        rows = channels_of_last(after, width).reshape(attention.attributes[names[0]].as_int(), -1)
        heads = np.unique(np.sort(rows, axis=1), axis=0)
    if np.unique(heads).size != heads.size:
        raise LayoutError("they overlap")
    return heads


def _rows(channels: Int64, heads: Int64) -> Int64:
    """Group the rows of the output projection by query head; ``channels`` [K] says what value channel each reads."""
    values, counts = np.unique(channels, return_counts=True)
    if not np.array_equal(values, np.unique(heads)) or len(set(counts)) != 1:
        raise LayoutError("not every channel of every head is read equally often")
    # Rows of one value channel in ascending order: the n-th of each channel of a head belong to its n-th query head.
    readers = np.argsort(channels, kind="stable").reshape(values.size, -1)[np.searchsorted(values, heads)]
    rows: Int64 = readers.transpose(0, 2, 1).reshape(-1, heads.shape[1])
    return rows


def _entries(target: ScaleTarget, channels: Int64, heads: Int64) -> Int64:
    """Return where a target holds the channels of each head."""
    held = np.flatnonzero(target.channels >= 0)
    values = channels[target.channels[held]]
    if not np.array_equal(np.sort(values), np.sort(heads, axis=None)):
        raise LayoutError(f"{target.initializer.name} does not hold every channel of every head once")
    order = np.argsort(values)
    return held[order][np.searchsorted(values[order], heads)]
