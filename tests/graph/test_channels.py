"""Layouts say exactly what numpy does to channel numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.graph.channels import Layout, LayoutError, channels_of_last, follow, start


def _constant(array: np.ndarray) -> ir.Value:
    value = ir.Value(name="c", shape=ir.Shape(array.shape), const_value=ir.tensor(array))
    ir.Graph([], [], nodes=[], initializers=[value])
    return value


def _node(op_type: str, inputs: list[ir.Value], shape: list[int | None] | None = None, **attributes: object) -> ir.Node:
    output = ir.Value(name="o", shape=None if shape is None else ir.Shape(shape))
    attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    return ir.Node("", op_type, inputs, attrs, outputs=[output], name="n")


def _numbers(layout: Layout, sizes: tuple[int, ...]) -> np.ndarray:
    """The channel number at every position, for given sizes of every dimension."""
    numbers = np.full((), layout.offset)
    for dim, size in zip(layout.dims, sizes, strict=True):
        factors = [(factor.size if factor.size is not None else -1, factor.stride) for factor in dim]
        known = int(np.prod([f for f, _ in factors if f > 0])) if factors else 1
        along = np.zeros((), np.int64)
        for factor, stride in factors:
            count = factor if factor > 0 else size // known
            along = along[..., None] + np.arange(count) * stride
        numbers = numbers[..., None] + along.reshape(-1)
    return numbers


@st.composite
def _walks(draw: st.DrawFn) -> tuple[int, list[tuple[str, object]], np.ndarray]:
    """Batch 2, sequence 3, channels, then random reshapes, transposes, selections: what numpy makes of them."""
    channels = draw(st.sampled_from([8, 12, 24]))
    array = np.broadcast_to(np.arange(channels), (2, 3, channels))
    walk: list[tuple[str, object]] = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["split", "merge", "transpose", "unsqueeze", "expand", "slice"]))
        last = array.ndim - 1
        if kind == "split":
            axis = draw(st.integers(0, last))
            divisors = [d for d in range(2, array.shape[axis]) if array.shape[axis] % d == 0]
            if not divisors or array.ndim > 5:
                continue
            inner = draw(st.sampled_from(divisors))
            shape = (*array.shape[:axis], array.shape[axis] // inner, inner, *array.shape[axis + 1 :])
            walk.append(("Reshape", shape))
            array = array.reshape(shape)
        elif kind == "merge" and array.ndim > 2:
            axis = draw(st.integers(0, last - 1))
            shape = (*array.shape[:axis], array.shape[axis] * array.shape[axis + 1], *array.shape[axis + 2 :])
            walk.append(("Reshape", shape))
            array = array.reshape(shape)
        elif kind == "transpose":
            permutation = draw(st.permutations(range(array.ndim)))
            walk.append(("Transpose", tuple(permutation)))
            array = array.transpose(permutation)
        elif kind == "unsqueeze" and array.ndim < 6:
            axis = draw(st.integers(0, array.ndim))
            walk.append(("Unsqueeze", axis))
            array = np.expand_dims(array, axis)
        elif kind == "expand" and 1 in array.shape:
            shape = tuple(draw(st.integers(1, 3)) if size == 1 else size for size in array.shape)
            walk.append(("Expand", shape))
            array = np.broadcast_to(array, shape)
        elif kind == "slice":
            axis = draw(st.integers(0, last))
            if array.shape[axis] % 2 == 0:
                half = array.shape[axis] // 2
                first = draw(st.sampled_from([0, half]))
                walk.append(("Slice", (axis, first, first + half)))
                array = np.take(array, range(first, first + half), axis)
    return channels, walk, array


def _step(kind: str, detail: object, layout: Layout) -> Layout:
    x = ir.Value(name="x")
    if kind == "Transpose":
        return follow(layout, _node(kind, [x], perm=detail), 0, 0)
    if kind == "Slice":
        axis, first, stop = detail  # type: ignore[misc]
        ends = [_constant(np.array([value])) for value in (first, stop, axis)]
        return follow(layout, _node(kind, [x, *ends]), 0, 0)
    return follow(layout, _node(kind, [x, _constant(np.atleast_1d(np.array(detail)))]), 0, 0)


@settings(max_examples=400, deadline=None)
@given(_walks())
def test_layouts_agree_with_numpy(case: tuple[int, list[tuple[str, object]], np.ndarray]) -> None:
    channels, walk, array = case
    layout = start(channels, ir.Value(name="x", shape=ir.Shape([2, 3, channels])))
    for kind, detail in walk:
        try:
            layout = _step(kind, detail, layout)
        except LayoutError:
            return  # refusing is always allowed; a wrong answer is not
    expected = array
    try:
        numbers = _numbers(layout, array.shape)
    except ValueError:
        pytest.fail(f"layout {layout} does not have the shape {array.shape}")
    np.testing.assert_array_equal(np.broadcast_to(numbers, expected.shape), expected)
    np.testing.assert_array_equal(layout.channels(), np.unique(expected))


def test_few_of_these_walks_are_refused() -> None:
    """The property above would hold for a function that refuses everything."""
    refused = total = 0

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(_walks())
    def count(case: tuple[int, list[tuple[str, object]], np.ndarray]) -> None:
        nonlocal refused, total
        channels, walk, _ = case
        layout = start(channels, ir.Value(name="x", shape=ir.Shape([2, 3, channels])))
        total += 1
        try:
            for kind, detail in walk:
                layout = _step(kind, detail, layout)
        except LayoutError:
            refused += 1

    count()
    assert refused < 0.25 * total


@pytest.mark.parametrize(
    ("batch", "heads"),
    [([None, None], 4), ([None, None], -1), ([2, 7], 4), ([2, 7], -1), ([None, 7], 4), ([2, None], 4)],
)
def test_heads_with_unknown_batch_and_sequence(batch: list[int | None], heads: int) -> None:
    """The way of the values: [b, s, N] -> heads -> repeated for grouped queries -> [b, s, K]."""
    value = ir.Value(name="x", shape=ir.Shape([None, None, 32]))
    layout = start(32, value)
    parts = [ir.Value(name="p", shape=ir.Shape([1])) if size is None else _constant(np.array([size])) for size in batch]

    def shape(*sizes: int) -> ir.Value:
        whole = _node("Concat", [*parts, *(_constant(np.array([size])) for size in sizes)], axis=0)
        return whole.outputs[0]

    layout = follow(layout, _node("Reshape", [value, shape(heads, 8)]), 0, 0)
    layout = follow(layout, _node("Transpose", [value], perm=(0, 2, 1, 3)), 0, 0)
    layout = follow(layout, _node("Concat", [value, value], axis=2), 0, 0)
    layout = follow(layout, _node("Unsqueeze", [value, _constant(np.array([2]))]), 0, 0)
    grown = _node(
        "Concat", [parts[0], *(_constant(np.array([n])) for n in (4, 3)), parts[1], _constant(np.array([8]))], axis=0
    )
    layout = follow(layout, _node("Expand", [value, grown.outputs[0]]), 0, 0)
    merged = _node("Concat", [parts[0], _constant(np.array([12])), parts[1], _constant(np.array([8]))], axis=0)
    layout = follow(layout, _node("Reshape", [value, merged.outputs[0]]), 0, 0)
    layout = follow(layout, _node("MatMul", [value, value]), 1, 0)
    layout = follow(layout, _node("Transpose", [value], perm=(0, 2, 1, 3)), 0, 0)
    layout = follow(layout, _node("Reshape", [value, shape(96)]), 0, 0)
    head, channel = np.divmod(np.arange(96), 8)
    np.testing.assert_array_equal(channels_of_last(layout, 96), head // 3 * 8 + channel)


def test_ambiguous_reshape_is_refused() -> None:
    """[b, s, H, D] seen as [b, H, ?, D] without a transpose would mix positions and heads."""
    value = ir.Value(name="x", shape=ir.Shape([None, None, 32]))
    layout = follow(start(32, value), _node("Reshape", [value, _constant(np.array([0, 0, 4, 8]))]), 0, 0)
    shape = _node(
        "Concat",
        [
            ir.Value(name="p", shape=ir.Shape([1])),
            _constant(np.array([4])),
            ir.Value(name="q", shape=ir.Shape([1])),
            _constant(np.array([8])),
        ],
        axis=0,
    )
    with pytest.raises(LayoutError, match="not known"):
        follow(layout, _node("Reshape", [value, shape.outputs[0]]), 0, 0)


@pytest.mark.parametrize("op_type", ["Gelu", "ReduceSum", "Conv", "Softmax"])
def test_other_operators_are_refused(op_type: str) -> None:
    value = ir.Value(name="x", shape=ir.Shape([2, 3, 8]))
    with pytest.raises(LayoutError, match=op_type):
        follow(start(8, value), _node(op_type, [value]), 0, 0)


def test_channels_spread_over_two_dimensions_are_refused() -> None:
    value = ir.Value(name="x", shape=ir.Shape([2, 3, 8]))
    layout = follow(start(8, value), _node("Reshape", [value, _constant(np.array([2, 3, 2, 4]))]), 0, 0)
    with pytest.raises(LayoutError, match="several dimensions"):
        channels_of_last(layout, 4)
