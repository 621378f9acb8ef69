"""Find where an equalization scale or shift of an activation can be folded, so that no node has to be added.

Dividing channel k of an activation by s[k] is free when the activation is the result of a normalization (divide its
weight and bias) or a linear function of what an earlier linear layer gives (divide its weight columns and bias): the
value projection for the attention output projection, the up projection for the down projection.

Subtracting z[k] is free when a constant is added to the activation already (the bias of a LayerNorm, or that of the
value projection, as attention weights sum to one), and every layer that reads it has a bias that can take z W.
"""

from __future__ import annotations

__all__ = ["ScaleSite", "ScaleTarget", "ShiftSite", "find_scale_site", "find_shift_site"]

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.activation_groups import ActivationGroup
from fptq_onnx.graph.channels import Layout, LayoutError, channels_of_last, follow, start
from fptq_onnx.graph.constants import constant_array, constant_shape, root_initializer
from fptq_onnx.graph.linears import LinearLayer, LinearSearch
from fptq_onnx.graph.norms import FUSED_NORMS, normalized_input
from fptq_onnx.graph.trails import Trail, check_readers, find_trails

# Operators through which f(x - z) = f(x) - z with the channels moved; attentions are looked at one by one.
_SHIFTS_THROUGH = frozenset(
    {"Identity", "Cast", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand"}
    | {"Slice", "Split", "Gather", "Concat"}
)
_AFTER_SOFTMAX = frozenset({"Identity", "Cast", "Dropout"})


class Use(NamedTuple):
    """One input of one node; equal to the entries of ``onnx_ir.Value.uses()``."""

    node: ir.Node
    idx: int


@dataclasses.dataclass(frozen=True, eq=False)
class ScaleTarget:
    """An initializer to scale: entry i along ``axis`` by s[channels[i]], or not at all where channels[i] is -1.

    Attributes:
        initializer: The tensor, float.
        axis: Axis of the initializer, not negative.
        channels: int64 [initializer.shape[axis]], indices into s.
        uses: The node inputs that must read the scaled tensor.
    """

    initializer: ir.Value
    axis: int
    channels: np.ndarray
    uses: tuple[Use, ...]

    @property
    def shared(self) -> bool:
        """Whether others read the initializer too: then scale a private copy and give it to ``uses`` alone.

        Exporters merge equal tensors, so even norms that have nothing in common may share a weight. Evaluated anew each
        time, as scaling one target gives it its own copy. An initializer that is not shared must be scaled in place
        (a new ``const_value`` of the same value), since other targets may refer to it.
        """
        return self.initializer.is_graph_output() or not set(self.initializer.uses()) <= set(self.uses)


@dataclasses.dataclass(frozen=True, eq=False)
class ScaleSite:
    """Where 1/s of an activation with K channels goes.

    Attributes:
        kind: "norm": weight (and bias) of a normalization or a Mul by a vector; "linear": columns (and bias) of an
            earlier linear layer; "none": nowhere, insert a Mul.
        reason: Where the scale goes, or why it cannot be folded; a clause for the report.
        targets: What to divide; empty for "none".
        tie_groups: int64 [K]: channels with equal entries must get equal s, as they come from one channel of the
            producer (query heads that share a value head); 0..K-1 when every channel is free.
        producer: The node that the targets belong to; None for "none".
        scales_cache: The values in the key-value cache come out divided too: caches of the model before and after must
            not be mixed. The logits stay the same.
    """

    kind: Literal["norm", "linear", "none"]
    reason: str
    targets: tuple[ScaleTarget, ...]
    tie_groups: np.ndarray
    producer: ir.Node | None = None
    scales_cache: bool = False


def find_scale_site(model: ir.Model, group: ActivationGroup, linears: LinearSearch) -> ScaleSite:
    """Find the initializers that take 1/s of a group's activation.

    Args:
        model: The model ``linears`` was found in.
        group: The layers that read the activation; their weight rows are to be multiplied by s.
        linears: Result of ``find_linears``.

    Returns:
        A site such that dividing its targets and multiplying row k of every weight of the group by s[k] leaves every
        output of the model unchanged (but for a cache, see ``scales_cache``), for s > 0 constant over tie groups.
    """
    layers = {layer.node: layer for layer in linears.layers}
    free = np.arange(group.k, dtype=np.int64)
    try:
        trails = find_trails(group.activation, layers.keys(), linears.flow)
        for trail in trails[:-1]:
            try:
                return _site(trail, group, layers)
            except LayoutError:
                continue
        return _site(trails[-1], group, layers)
    except LayoutError as error:
        origins = linears.flow.linears(group.activation)
        reason = str(error)
        if origins and all(origins.values()):
            sources = ", ".join(layers[node].label for node in origins)
            reason = f"a non-linear function lies between {sources} and the activation"
        return ScaleSite("none", reason, (), free)


@dataclasses.dataclass(frozen=True, eq=False)
class ShiftSite:
    """Where the shift z of an activation with K channels goes.

    Attributes:
        reason: Where z goes, or why it cannot be folded; a clause for the report.
        target: The added constant to lower by z: entry i by z[channels[i]]; None where there is none.
        tie_groups: As in `ScaleSite`: channels with equal entries must get equal z.
        scales_cache: As in `ScaleSite`.
    """

    reason: str
    target: ScaleTarget | None
    tie_groups: np.ndarray
    scales_cache: bool = False


def find_shift_site(group: ActivationGroup, linears: LinearSearch) -> ShiftSite:
    """Find the added constant that takes -z of a group's activation.

    Args:
        group: The layers that read the activation; each of their biases is to gain z W.
        linears: Result of ``find_linears``.

    Returns:
        A site such that subtracting z from its target and adding z W to the bias of every layer of the group leaves
        every output of the model unchanged (but for a cache), for z constant over tie groups.
    """
    layers = {layer.node: layer for layer in linears.layers}
    attentions = {attention.node for attention in linears.flow.attentions}
    try:
        for layer in group.layers:
            if layer.bias is None or (layer.bias_node is None and _beta(layer.node) == 0):
                raise LayoutError(f"{layer.label} has no bias to make up for a shift")
        (trail, *others) = find_trails(group.activation, layers.keys(), linears.flow)
        if others:
            raise LayoutError("the activation is a product of two others")
        return _shift_site(trail, group, layers, attentions)
    except LayoutError as error:
        return ShiftSite(str(error), None, np.arange(group.k, dtype=np.int64))


def _site(trail: Trail, group: ActivationGroup, layers: Mapping[ir.Node, LinearLayer]) -> ScaleSite:
    source = layers.get(trail.source)
    layouts = [start(_norm_width(trail.source) if source is None else source.n, trail.output)]
    for step in trail.steps:
        layouts.append(follow(layouts[-1], *step))
    channels = channels_of_last(layouts[-1], group.k)
    inverse = _inverse(channels, layouts[0])
    cached = check_readers(trail, layouts, {layer.node for layer in group.layers}, np.unique(channels))
    own = _norm_targets(trail.source, inverse) if source is None else _linear_targets(source, inverse)
    targets = (*own, *_bias_targets(trail, layouts, inverse))
    if source is not None:
        ties = np.unique(channels, return_inverse=True)[1].reshape(-1).astype(np.int64)
        reason = f"output channels of {source.label} ({source.name})"
        return ScaleSite("linear", reason, targets, ties, source.node, cached)
    what = "vector" if trail.source.op_type == "Mul" and not _scales_a_norm(trail.source) else "norm weight"
    reason = f"{what} {own[0].initializer.name} ({trail.source.name})"
    return ScaleSite("norm", reason, targets, np.arange(group.k, dtype=np.int64), trail.source, cached)


def _shift_site(
    trail: Trail, group: ActivationGroup, layers: Mapping[ir.Node, LinearLayer], attentions: Collection[ir.Node]
) -> ShiftSite:
    source = layers.get(trail.source)
    layouts = [start(_norm_width(trail.source) if source is None else source.n, trail.output)]
    for step in trail.steps:
        layouts.append(follow(layouts[-1], *step))
    channels = channels_of_last(layouts[-1], group.k)
    cached = check_readers(trail, layouts, {layer.node for layer in group.layers}, np.unique(channels))
    target = _added_constant(trail, layouts, _inverse(channels, layouts[0]), layers, attentions)
    ties = np.unique(channels, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return ShiftSite(f"bias {target.initializer.name} ({target.uses[0].node.name})", target, ties, cached)


def _added_constant(
    trail: Trail,
    layouts: list[Layout],
    inverse: np.ndarray,
    layers: Mapping[ir.Node, LinearLayer],
    attentions: Collection[ir.Node],
) -> ScaleTarget:
    """The last vector that is added on the way to an activation, with nothing but moves and attention behind it."""
    for step, layout in zip(reversed(trail.steps), reversed(layouts[:-1]), strict=True):
        node = step.node
        if node.op_type == "Add":
            shape = constant_shape(*_root(node.inputs[1 - step.input_index]))
            if shape and shape[-1] > 1 and math.prod(shape) == shape[-1]:
                channels = channels_of_last(layout, shape[-1])
                return _target(node, 1 - step.input_index, -1, inverse[channels])
        elif node in attentions:
            _check_weights_sum_to_one(node, step.input_index)
        elif node.op_type not in _SHIFTS_THROUGH:
            raise LayoutError(f"the {node.op_type} node {node.name} does not let a shift through")
    node, source = trail.source, layers.get(trail.source)
    if source is not None:
        if source.bias is None or source.bias_node is not None or _beta(node) != 1:
            raise LayoutError(f"{source.label} has no bias that a shift could be folded into")
        return _target(node, 2, -1, inverse)
    bias = None if node.op_type == "Mul" else FUSED_NORMS[node.domain, node.op_type][2]
    if bias is None or len(node.inputs) <= bias or node.inputs[bias] is None:
        raise LayoutError(f"{node.name} adds no bias that a shift could be folded into")
    return _target(node, bias, -1, inverse)


def _check_weights_sum_to_one(node: ir.Node, value_input: int) -> None:
    """Raise LayoutError unless an attention gives mean values: then it gives X - z for values X - z."""
    sinks = len(node.inputs) > 11 and node.inputs[11] is not None
    if node.op_type == "GroupQueryAttention" and (sinks or _flag(node, "smooth_softmax")):
        raise LayoutError(f"the weights of the attention {node.name} do not sum to one")
    if node.op_type != "MatMul":
        return
    weights = node.inputs[0]
    producer = None if weights is None else weights.producer()
    while producer is not None and (producer.op_type in _AFTER_SOFTMAX or _zeroes_nan(producer)):
        weights = producer.inputs[2 if producer.op_type == "Where" else 0]
        producer = None if weights is None else weights.producer()
    axis = -1
    if producer is not None and weights is not None and "axis" in producer.attributes:
        axis = producer.attributes["axis"].as_int()
        axis = -1 if weights.shape is not None and axis == weights.shape.rank() - 1 else axis
    if value_input != 1 or producer is None or producer.op_type != "Softmax" or axis != -1:
        raise LayoutError(f"the weights of the attention {node.name} are not known to sum to one")


def _zeroes_nan(node: ir.Node) -> bool:
    """Whether a node is Where(IsNaN(p), 0, p): what exporters put behind the softmax of rows that attend to nothing."""
    if node.op_type != "Where" or node.inputs[0] is None or node.inputs[2] is None:
        return False
    tested, zero = node.inputs[0].producer(), constant_array(node.inputs[1])
    is_nan = tested is not None and tested.op_type == "IsNaN" and tested.inputs[0] is node.inputs[2]
    return is_nan and zero is not None and not zero.any()


def _beta(node: ir.Node) -> float:
    return node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0


def _scales_a_norm(node: ir.Node) -> bool:
    data = node.inputs[1 - _norm_weight_index(node)]
    while data is not None and (producer := data.producer()) is not None and producer.op_type == "Cast":
        data = producer.inputs[0]
    return data is not None and normalized_input(data) is not None


def _norm_width(node: ir.Node) -> int:
    return int(constant_shape(*_norm_weight(node))[-1])


def _norm_weight(node: ir.Node) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    return _root(node.inputs[_norm_weight_index(node)])


def _norm_weight_index(node: ir.Node) -> int:
    if node.op_type == "Mul":
        return next(index for index, operand in enumerate(node.inputs) if root_initializer(operand) is not None)
    return FUSED_NORMS[node.domain, node.op_type][1]


def _inverse(channels: np.ndarray, source: Layout) -> np.ndarray:
    """For each channel of the source the first activation channel it becomes, -1 for none: int64 [channels]."""
    width = source.dims[-1][0].size
    assert width is not None
    inverse = np.full(width, -1, np.int64)
    inverse[channels[::-1]] = np.arange(len(channels), dtype=np.int64)[::-1]
    return inverse


def _linear_targets(layer: LinearLayer, inverse: np.ndarray) -> list[ScaleTarget]:
    axis = 0 if _flag(layer.node, "transB") else 1
    weight = _target(layer.node, 1, axis, inverse)
    if weight.shared:  # a copy would leave the other layers' view of this weight behind
        raise LayoutError(f"the weight {layer.weight.name} of {layer.label} is read by other nodes too")
    targets = [weight]
    if layer.bias is not None and layer.bias_node is None:
        targets.append(_target(layer.node, 2, -1, inverse))
    return targets


def _norm_targets(node: ir.Node, inverse: np.ndarray) -> list[ScaleTarget]:
    targets = [_target(node, _norm_weight_index(node), -1, inverse)]
    bias = None if node.op_type == "Mul" else FUSED_NORMS[node.domain, node.op_type][2]
    if bias is not None and len(node.inputs) > bias and node.inputs[bias] is not None:
        targets.append(_target(node, bias, -1, inverse))
    return targets


def _bias_targets(trail: Trail, layouts: list[Layout], inverse: np.ndarray) -> list[ScaleTarget]:
    """Constants added between the source and the activation are divided like what they are added to."""
    targets = []
    for (node, input_index, _), layout in zip(trail.steps, layouts, strict=False):
        if node.op_type != "Add":
            continue
        operand = node.inputs[1 - input_index]
        array = constant_array(operand)
        if array is not None and not array.any():
            continue
        shape = constant_shape(*_root(operand))
        if not shape or shape[-1] == 1 or math.prod(shape) != shape[-1]:
            raise LayoutError(f"{node.name} adds a constant of shape {list(shape)} on the way")
        channels = channels_of_last(layout, shape[-1])
        targets.append(_target(node, 1 - input_index, -1, inverse[channels]))
    return targets


def _target(node: ir.Node, input_index: int, axis: int, channels: np.ndarray) -> ScaleTarget:
    """Describe the division of what a node input reads, along ``axis`` of it, in terms of the root initializer."""
    root, path = _root(node.inputs[input_index])
    rank = len(constant_shape(root, path))
    axis %= rank
    for step in reversed(path):
        if step.op_type == "DequantizeLinear":
            raise LayoutError(f"{root.name} is quantized already")
        if len(step.outputs[0].uses()) != 1 or step.outputs[0].is_graph_output():
            raise LayoutError(f"{root.name} is read through the {step.op_type} node {step.name} by others too")
        if step.op_type == "Transpose":
            permutation = step.attributes["perm"].as_ints() if "perm" in step.attributes else range(rank)[::-1]
            axis = permutation[axis]
    if constant_shape(root, ())[axis] != len(channels):
        raise LayoutError(f"{root.name} has shape {list(constant_shape(root, ()))}, not one entry per channel")
    first = Use(path[0], 0) if path else Use(node, input_index)
    return ScaleTarget(root, axis, channels, (first,))


def _root(value: ir.Value | None) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    found = root_initializer(value)
    if found is None:
        raise LayoutError(f"{'an input' if value is None else value.name} is not constant")
    return found


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())
