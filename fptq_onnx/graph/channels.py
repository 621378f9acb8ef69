"""Follow the channels of a tensor through reshapes, transposes, head repetition and attention.

A layout describes one dimension as a product of factors. Walking along a factor moves by its stride through the
channels of the tensor the walk started at; stride 0 marks batch, sequence and repeated heads. Reshape splits and merges
factors, Transpose permutes dimensions, Expand adds factors of stride 0: so the origin of every channel stays an exact,
closed expression, whatever way an exporter writes grouped-query attention.
"""

from __future__ import annotations

__all__ = ["Layout", "LayoutError", "channels_of_last", "follow", "start"]

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.constants import constant_array, integers

_UNCHANGED = frozenset({"Identity", "Cast", "Dropout", "Add", "Mul", "Div", "Relu"})


class LayoutError(Exception):
    """The channels cannot be followed; the message is a clause for the user."""


class Factor(NamedTuple):
    """Part of a dimension: its size (None: only known at run time) and its stride in channels."""

    size: int | None
    stride: int


Dim = tuple[Factor, ...]
_UNKNOWN: Dim = (Factor(None, 0),)


class Layout(NamedTuple):
    """Where the channels of a tensor come from: one tuple of factors per dimension, and an offset."""

    dims: tuple[Dim, ...]
    offset: int = 0

    def channels(self) -> np.ndarray:
        """Return every origin channel held anywhere in the tensor, int64, sorted."""
        held = [factor for dim in self.dims for factor in dim if factor.stride]
        return np.unique(_indices(held) + self.offset)


def start(channels: int, value: ir.Value) -> Layout:
    """Return the layout of a tensor [..., channels] at which the walk starts."""
    rank = value.shape.rank() if value.shape is not None else 3
    return Layout((*[_UNKNOWN] * (rank - 1), (Factor(channels, 1),)))


def channels_of_last(layout: Layout, size: int) -> np.ndarray:
    """Return the origin channel of each of the ``size`` entries of the last dimension, int64 [size].

    Raises:
        LayoutError: Other dimensions hold channels too, or the last one has another size.
    """
    if any(factor.stride for dim in layout.dims[:-1] for factor in dim):
        raise LayoutError("its channels are spread over several dimensions")
    if _product(layout.dims[-1]) != size:
        raise LayoutError("the size of its last dimension is not known")
    return _indices(layout.dims[-1]) + layout.offset


def follow(layout: Layout, node: ir.Node, input_index: int, output_index: int) -> Layout:
    """Return the layout of one output of a node, from that of one of its inputs.

    Raises:
        LayoutError: The operator is not one that merely moves channels, or its shapes are not known well enough.
    """
    if node.op_type in _UNCHANGED:
        return layout
    if node.op_type == "MatMul" and input_index == 1:
        return _weighted_sum(layout, node)
    rule = _RULES.get(node.op_type)
    if rule is None or (input_index != 0 and node.op_type != "Concat" and node.op_type not in _ATTENTION):
        raise LayoutError(f"its channels cannot be followed through the {node.op_type} node {node.name}")
    try:
        return rule(layout, node, output_index if node.op_type == "Split" else input_index)
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise LayoutError(f"the {node.op_type} node {node.name} has shapes that are not known here") from error


def _reshape(layout: Layout, node: ir.Node, _: int) -> Layout:
    target = _target_shape(node, node.inputs[1])
    if not ("allowzero" in node.attributes and node.attributes["allowzero"].as_int()):
        target = [_product(layout.dims[axis]) if size == 0 else size for axis, size in enumerate(target)]
    flat = [factor for dim in layout.dims for factor in dim if factor.size != 1]
    rest = target.index(-1) if -1 in target else -1
    right = _take_all(flat, target[rest + 1 :][::-1], _split_inner)
    flat.reverse()
    left = _take_all(flat, target[: max(rest, 0)], _split_outer)
    flat.reverse()
    result = [tuple(reversed(dim)) for dim in left] + right[::-1]
    if rest >= 0:
        result.insert(rest, tuple(flat))
        flat = []
    if any(factor.stride for factor in flat):
        raise LayoutError(f"the Reshape node {node.name} has shapes that are not known here")
    return Layout(tuple(result), layout.offset)


_Splitter = Callable[[Factor, int], tuple[Factor, Factor]]


def _split_inner(factor: Factor, size: int) -> tuple[Factor, Factor]:
    """Split a factor in an outer rest and an inner part of ``size``."""
    return Factor(_div(factor.size, size), factor.stride * size), Factor(size, factor.stride)


def _split_outer(factor: Factor, size: int) -> tuple[Factor, Factor]:
    """Split a factor in an inner rest and an outer part of ``size``."""
    inner = _div(factor.size, size)
    return Factor(inner, factor.stride), Factor(size, factor.stride * inner)


def _take_all(flat: list[Factor], sizes: Sequence[int | None], split: _Splitter) -> list[Dim]:
    """Take one dimension after another off the end of ``flat``; neighbours of unknown size share one run."""
    dims: list[Dim] = []
    for position, size in enumerate(sizes):
        shared = size is None and position > 0 and sizes[position - 1] is None
        dims.append(() if shared else _take(flat, size, split))
    return dims


def _take(flat: list[Factor], size: int | None, split: _Splitter) -> Dim:
    """Take factors off the end of ``flat`` until their product is ``size``; for an unknown size, all unknown ones."""
    taken: list[Factor] = []
    if size is None:
        if flat and flat[-1].stride:
            raise ValueError("an unknown size could be anything")
        if flat and flat[-1].size is not None:
            taken.append(flat.pop())
        while flat and flat[-1].size is None:
            taken.insert(0, flat.pop())
        return tuple(taken)
    while size > 1:
        if not flat or flat[-1].size is None:  # a batch or sequence whose size is known only here
            if flat:
                flat.pop()
            taken.insert(0, Factor(size, 0))
            break
        last = flat.pop()
        assert last.size is not None
        if size % last.size == 0:
            taken.insert(0, last)
            size //= last.size
        else:
            rest, part = split(last, size)
            flat.append(rest)
            taken.insert(0, part)
            size = 1
    return tuple(taken)


def _transpose(layout: Layout, node: ir.Node, _: int) -> Layout:
    permutation = node.attributes["perm"].as_ints()
    if len(permutation) != len(layout.dims):
        raise ValueError("rank")
    return Layout(tuple(layout.dims[axis] for axis in permutation), layout.offset)


def _unsqueeze(layout: Layout, node: ir.Node, _: int) -> Layout:
    axes = _known(integers(node.inputs[1]))
    dims, rank = list(layout.dims), len(layout.dims) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        dims.insert(axis, ())
    return Layout(tuple(dims), layout.offset)


def _squeeze(layout: Layout, node: ir.Node, _: int) -> Layout:
    axes = {axis % len(layout.dims) for axis in _known(integers(node.inputs[1]))}
    if any(factor.stride for axis in axes for factor in layout.dims[axis]):
        raise ValueError("channels")
    return Layout(tuple(dim for axis, dim in enumerate(layout.dims) if axis not in axes), layout.offset)


def _flatten(layout: Layout, node: ir.Node, _: int) -> Layout:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    merged = (sum(layout.dims[:axis], ()), sum(layout.dims[axis:], ()))
    return Layout(merged, layout.offset)


def _expand(layout: Layout, node: ir.Node, _: int) -> Layout:
    target = _target_shape(node, node.inputs[1])
    dims = [()] * (len(target) - len(layout.dims)) + list(layout.dims)
    grown = [
        (_UNKNOWN if size is None else (Factor(size, 0),)) if _product(dim) == 1 and size != 1 else dim
        for dim, size in zip(dims, target, strict=True)
    ]
    return Layout(tuple(grown), layout.offset)


def _concat(layout: Layout, node: ir.Node, _: int) -> Layout:
    axis = node.attributes["axis"].as_int() % len(layout.dims)
    return Layout(_without_channels(layout, axis, node), layout.offset)


def _split(layout: Layout, node: ir.Node, output_index: int) -> Layout:
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(layout.dims)
    sizes = integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is None:
        whole, parts = _product(layout.dims[axis]), len(node.outputs)
        if whole is None:
            return Layout(_without_channels(layout, axis, node), layout.offset)
        size = -(-whole // parts)
        sizes = [min(size, whole - size * index) for index in range(parts)]
    known = _known(sizes)
    return _select(layout, axis, sum(known[:output_index]), known[output_index])


def _slice(layout: Layout, node: ir.Node, _: int) -> Layout:
    begins, ends = _known(integers(node.inputs[1])), _known(integers(node.inputs[2]))
    axes = (
        _known(integers(node.inputs[3])) if len(node.inputs) > 3 and node.inputs[3] is not None else range(len(begins))
    )
    steps = (
        _known(integers(node.inputs[4])) if len(node.inputs) > 4 and node.inputs[4] is not None else [1] * len(begins)
    )
    for begin, end, axis, step in zip(begins, ends, axes, steps, strict=True):
        axis %= len(layout.dims)
        size = _product(layout.dims[axis])
        if not any(factor.stride for factor in layout.dims[axis]):
            layout = Layout(_without_channels(layout, axis, node), layout.offset)
        elif size is None or step != 1:
            raise ValueError("step")
        else:
            first, stop, _step = slice(begin, end).indices(size)
            layout = _select(layout, axis, first, stop - first)
    return layout


def _gather(layout: Layout, node: ir.Node, _: int) -> Layout:
    index = constant_array(node.inputs[1])
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(layout.dims)
    if index is None or index.ndim != 0:
        raise ValueError("index")
    picked = layout
    if any(factor.stride for factor in layout.dims[axis]):
        picked = _select(layout, axis, int(index) % (_product(layout.dims[axis]) or 1), 1)
    return Layout(picked.dims[:axis] + picked.dims[axis + 1 :], picked.offset)


def _select(layout: Layout, axis: int, first: int, length: int) -> Layout:
    """Keep ``length`` entries from ``first`` on of one dimension: whole steps of its outermost factor."""
    dim = layout.dims[axis]
    outer, inner = dim[0], _product(dim[1:])
    if inner is None or outer.size is None or first % inner or length % inner:
        raise ValueError("range")
    steps = length // inner
    kept = (Factor(steps, outer.stride), *dim[1:]) if steps != 1 else dim[1:]
    dims = (*layout.dims[:axis], kept, *layout.dims[axis + 1 :])
    return Layout(dims, layout.offset + first // inner * outer.stride)


def _weighted_sum(layout: Layout, node: ir.Node) -> Layout:
    """Probabilities [..., S, T] times values [..., T, D]: the sum runs over T, a value head may serve several heads."""
    dims = list(_without_channels(layout, len(layout.dims) - 2, node))
    weights = node.inputs[0]
    if weights is not None and weights.shape is not None and weights.shape.rank() == len(dims):
        for axis in range(len(dims) - 2):
            size = weights.shape[axis]
            if _product(dims[axis]) == 1 and isinstance(size, int) and size > 1:
                dims[axis] = (Factor(size, 0),)
    return Layout(tuple(dims), layout.offset)


def _grouped_query_attention(layout: Layout, node: ir.Node, input_index: int) -> Layout:
    """Onnxruntime's operators with [batch, sequence, heads * size] operands, packed into input 0 or not."""
    heads = _attribute(node, "num_heads", "q_num_heads")
    groups = _attribute(node, "kv_num_heads") if "kv_num_heads" in node.attributes else heads
    whole = _product(layout.dims[-1])
    if len(layout.dims) != 3 or whole is None or heads % groups:
        raise ValueError("heads")
    if input_index == 0:  # packed: query, key and value heads in this order
        size = whole // (heads + 2 * groups)
        layout = _select(layout, 2, (heads + groups) * size, groups * size)
    else:
        size = whole // groups
    flat = list(layout.dims[-1])
    per_head, per_group = _take(flat, size, _split_inner), _take(flat, groups, _split_inner)
    merged = (*per_group, Factor(heads // groups, 0), *per_head)
    return Layout((_UNKNOWN, _UNKNOWN, merged), layout.offset)


def _multi_head_attention(layout: Layout, node: ir.Node, input_index: int) -> Layout:
    if input_index != 2 or (len(node.inputs) > 3 and node.inputs[3] is not None):
        raise LayoutError(f"the {node.op_type} node {node.name} packs its operands or adds their bias")
    return _grouped_query_attention(layout, node, input_index)


def _onnx_attention(layout: Layout, node: ir.Node, input_index: int) -> Layout:
    if node.domain != "":
        raise LayoutError(f"the {node.op_type} node {node.name} holds projection weights of its own")
    if len(layout.dims) == 3:
        return _grouped_query_attention(layout, node, input_index)
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    heads, groups = query.shape[1], _product(layout.dims[1])
    if not isinstance(heads, int) or groups is None or heads % groups:
        raise ValueError("heads")
    repeated = (*layout.dims[1], Factor(heads // groups, 0))
    return Layout((layout.dims[0], repeated, _UNKNOWN, layout.dims[3]), layout.offset)


_ATTENTION: dict[str, Callable[[Layout, ir.Node, int], Layout]] = {
    "GroupQueryAttention": _grouped_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _onnx_attention,
}
_RULES: dict[str, Callable[[Layout, ir.Node, int], Layout]] = {
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    **_ATTENTION,
}


def _target_shape(node: ir.Node, shape_input: ir.Value | None) -> list[int | None]:
    """Combine what the shape input and the recorded output shape say about the result of Reshape or Expand."""
    wanted, recorded = integers(shape_input), node.outputs[0].shape
    if wanted is None:
        if recorded is None:
            raise ValueError("rank")
        wanted = [None] * recorded.rank()
    for axis, size in enumerate(recorded if recorded is not None and recorded.rank() == len(wanted) else ()):
        if isinstance(size, int) and (wanted[axis] is None or (wanted[axis] or 0) < 1):
            wanted[axis] = size
    return wanted


def _without_channels(layout: Layout, axis: int, node: ir.Node) -> tuple[Dim, ...]:
    if any(factor.stride for factor in layout.dims[axis]):
        raise LayoutError(f"the {node.op_type} node {node.name} runs over its channels")
    return (*layout.dims[:axis], _UNKNOWN, *layout.dims[axis + 1 :])


def _attribute(node: ir.Node, *names: str) -> int:
    return next(node.attributes[name].as_int() for name in names if name in node.attributes)


def _known(values: Sequence[int | None] | None) -> list[int]:
    if values is None or any(value is None for value in values):
        raise ValueError("not constant")
    return [value for value in values if value is not None]


def _product(dim: Sequence[Factor]) -> int | None:
    sizes = [factor.size for factor in dim]
    return None if any(size is None for size in sizes) else math.prod(size for size in sizes if size is not None)


def _div(size: int | None, by: int) -> int:
    if size is None or size % by:
        raise ValueError("sizes do not divide")
    return size // by


def _indices(factors: Sequence[Factor]) -> np.ndarray:
    indices = np.zeros((), np.int64)
    for size, stride in factors:
        indices = indices[..., None] + np.arange(size if size is not None else 1, dtype=np.int64) * stride
    return indices.reshape(-1)
