"""W4A8MatMul: kernel, function body and reference agree; malformed nodes are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import op_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fptq_onnx.ops import w4a8_matmul

LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Leading dimensions (rank 1 to 4, zero rows included), K, N and a group length 1..K."""
    rows = draw(st.lists(st.integers(0, 5), max_size=3))
    k = draw(st.integers(1, 200))
    n = draw(st.integers(1, 70))
    group = draw(st.one_of(st.sampled_from([8, 16, 32, 64, 128]), st.integers(1, 200), st.just(k)))
    return rows, k, n, min(group, k)


@settings(max_examples=500, deadline=None)
@given(shapes(), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_integer_part_is_exact(shape: tuple[list[int], int, int, int], dtype: str, zero_point: int, seed: int) -> None:
    """One group has scale 1, the others 0, so Y is that group's integer sum, rounded once to T."""
    rows, k, n, block = shape
    rng = np.random.default_rng(seed)
    problem = op_models.random_problem(rng, rows, k, n, block, dtype)
    groups = problem["b_scale"].shape[0]
    group = int(rng.integers(groups))
    b_scale = np.zeros((groups, n), dtype=op_models.NUMPY_DTYPES[dtype])
    b_scale[group] = 1
    model = op_models.matmul_model(problem["b"], b_scale, block, zero_point=zero_point)
    (y,) = op_models.run(model, {"A": problem["a"], "a_scale": np.array(1, dtype=np.float32)})
    exact = w4a8_matmul.group_sums(problem["a"], zero_point, problem["b"], block)[..., group, :]
    expected = exact.astype(np.float32).astype(b_scale.dtype)  # |sum| <= 200 * 255 * 8 < 2**24
    np.testing.assert_array_equal(y, expected.astype(y.dtype))


@settings(max_examples=200, deadline=None)
@given(
    shapes(),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 255),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_agrees_with_the_reference(
    shape: tuple[list[int], int, int, int], dtype: str, zero_point: int, per_token: bool, seed: int
) -> None:
    rows, k, n, block = shape
    problem = op_models.random_problem(np.random.default_rng(seed), rows, k, n, block, dtype)
    a_scale = problem["a_scale"] if per_token else np.array([0.37], dtype=np.float32)
    model = op_models.matmul_model(problem["b"], problem["b_scale"], block, zero_point=zero_point)
    (y,) = op_models.run(model, {"A": problem["a"], "a_scale": a_scale})
    expected = w4a8_matmul.reference(problem["a"], a_scale, zero_point, problem["b"], problem["b_scale"], block)
    assert y.shape == expected.shape
    # Each of the G products and sums is rounded to float32 once; the result is rounded to T.
    sums = np.abs(w4a8_matmul.group_sums(problem["a"], zero_point, problem["b"], block))
    terms = (sums * np.abs(problem["b_scale"].astype(np.float64))).sum(axis=-2) * np.abs(a_scale)
    float_error = terms * (sums.shape[-2] + 4) * 2.0**-24
    smallest = 2.0**-25 if dtype == "float16" else 0.0  # half a subnormal
    tolerance = float_error + (np.abs(expected) + float_error) * op_models.ROUNDING[dtype] + smallest
    assert np.all(np.abs(y.astype(np.float64) - expected) <= tolerance)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "n", "block"),
    [(64, 32, 32), (256, 48, 128), (256, 16, 256), (100, 37, 32), (300, 5, 100), (7, 3, 7), (20, 5, 1)],
)
def test_function_body_agrees_with_the_kernel(k: int, n: int, block: int, dtype: str, level: str) -> None:
    problem = op_models.random_problem(np.random.default_rng(k + n), [2, 3], k, n, block, dtype)
    model = op_models.matmul_model(problem["b"], problem["b_scale"], block, zero_point=77)
    feeds = {"A": problem["a"], "a_scale": problem["a_scale"]}
    (kernel,) = op_models.run(model, feeds)
    (body,) = op_models.run(model, feeds, library=False, level=LEVELS[level])
    tolerance = max(1e-4, 2.1 * op_models.ROUNDING[dtype]) * np.abs(kernel.astype(np.float64)).max()
    np.testing.assert_allclose(body.astype(np.float64), kernel.astype(np.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "n", "block"), [(64, 32, 32), (256, 48, 128), (256, 16, 256), (100, 37, 32), (7, 3, 7), (20, 5, 1)]
)
def test_function_body_of_integer_scales_gives_the_bits_of_the_kernel(
    k: int, n: int, block: int, dtype: str, level: str
) -> None:
    """Sums over all of K stay integers, and what follows has one order: nothing is left to differ."""
    rng = np.random.default_rng(k + n)
    problem = op_models.random_problem(rng, [2, 3], k, n, block, dtype)
    scale = _integer_scales(rng, -(-k // block), n, dtype)
    model = op_models.matmul_model(problem["b"], scale, block, zero_point=77, scale_max_multiple=15)
    feeds = {"A": problem["a"], "a_scale": problem["a_scale"]}
    (kernel,) = op_models.run(model, feeds)
    (body,) = op_models.run(model, feeds, library=False, level=LEVELS[level])
    np.testing.assert_array_equal(body, kernel)
    assert np.abs(kernel.astype(np.float64)).max() > 0


def test_function_body_refuses_what_is_not_integer_structured() -> None:
    """A column that breaks the promise of the attribute is NaN, not nearly right; the others are not touched."""
    rng = np.random.default_rng(3)
    problem = op_models.random_problem(rng, [4], 64, 6, 32, "float32")
    scale = _integer_scales(rng, 2, 6, "float32")
    scale[:, 2] = 1.0, np.pi
    scale[:, 4] = 0.0
    model = op_models.matmul_model(problem["b"], scale, 32, scale_max_multiple=15)
    (y,) = op_models.run(model, {"A": problem["a"], "a_scale": problem["a_scale"]}, library=False)
    assert np.isnan(y[:, 2]).all() and not np.isnan(np.delete(y, 2, axis=1)).any()
    np.testing.assert_array_equal(y[:, 4], 0)


def _integer_scales(rng: np.random.Generator, groups: int, n: int, dtype: str) -> np.ndarray:
    """base[n] * i, |i| in 1..15, with bases of few bits so that all products are exact in any of the types."""
    multiple = rng.integers(1, 16, (groups, n)) * rng.choice([-1, 1], (groups, n))
    base = np.ldexp(rng.integers(8, 16, n), rng.integers(-9, -4, n))
    return (base * multiple).astype(op_models.DTYPES[dtype].numpy())


@pytest.mark.parametrize("library", [True, False], ids=["kernel", "body"])
@pytest.mark.parametrize("rows", [[], [0], [2, 0, 3], [1], [2, 1, 3]])
def test_leading_dimensions(rows: list[int], library: bool) -> None:
    problem = op_models.random_problem(np.random.default_rng(0), rows, 40, 9, 16, "float32")
    model = op_models.matmul_model(problem["b"], problem["b_scale"], 16)
    (y,) = op_models.run(model, {"A": problem["a"], "a_scale": problem["a_scale"]}, library=library)
    expected = w4a8_matmul.reference(problem["a"], problem["a_scale"], 128, problem["b"], problem["b_scale"], 16)
    assert y.shape == (*rows, 9)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_longest_sums_do_not_overflow() -> None:
    """All activations 255 (zero point 0) and all weights -8 give the largest magnitude of a group."""
    k = 60_000
    b = np.full((k, 2), -8, dtype=np.int8)
    model = op_models.matmul_model(b, np.ones((1, 2), dtype=np.float32), k, zero_point=0)
    (y,) = op_models.run(model, {"A": np.full((1, k), 255, np.uint8), "a_scale": np.array(1, np.float32)})
    np.testing.assert_array_equal(y, np.full((1, 2), -8 * 255 * k, dtype=np.float32))


def test_more_threads_give_the_same_bytes() -> None:
    problem = op_models.random_problem(np.random.default_rng(5), [37], 512, 515, 128, "float32")
    model = op_models.matmul_model(problem["b"], problem["b_scale"], 128)
    feeds = {"A": problem["a"], "a_scale": problem["a_scale"]}
    np.testing.assert_array_equal(op_models.run(model, feeds, threads=1)[0], op_models.run(model, feeds, threads=4)[0])


def test_int8_activations_are_used() -> None:
    """The op reads the uint8 tensor: one step of one activation moves Y by exactly scale * weight * a_scale."""
    b = np.array([[3], [-5]], dtype=np.int8)
    model = op_models.matmul_model(b, np.array([[0.5]], np.float32), 2)
    session = op_models.open_session(model)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    scale = np.array(0.25, np.float32)
    (low,) = session.run(None, {"A": np.array([[130, 10]], np.uint8), "a_scale": scale})
    (high,) = session.run(None, {"A": np.array([[130, 11]], np.uint8), "a_scale": scale})
    assert (high - low).item() == -5 * 0.5 * 0.25
    assert low.item() == (2 * 3 + -118 * -5) * 0.5 * 0.25


@pytest.mark.parametrize(
    ("a_shape", "expected"),
    [
        (["batch", "sequence", 64], ["batch", "sequence", 8]),
        ([2, 3, 64], [2, 3, 8]),
        ([64], [8]),
        (["batch", "sequence", "hidden"], ["batch", "sequence", 8]),
    ],
)
def test_shape_inference(a_shape: list[Any], expected: list[Any]) -> None:
    model = op_models.matmul_model(
        np.zeros((64, 8), np.int8), np.ones((2, 8), np.float32), 32, a_shape=a_shape, a_scale_shape=[1]
    )
    model.graph.outputs[0].shape = None
    assert op_models.open_session(model).get_outputs()[0].shape == expected


def test_shape_inference_gives_unknown_dimensions_distinct_names() -> None:
    model = op_models.matmul_model(
        np.zeros((64, 8), np.int8), np.ones((2, 8), np.float32), 32, a_shape=[None, None, 64], a_scale_shape=[1]
    )
    model.graph.outputs[0].shape = None
    first, second, last = op_models.open_session(model).get_outputs()[0].shape
    assert last == 8
    assert first != second


def _onnx_model(
    *,
    b_shape: tuple[int, ...] = (64, 8),
    scale_shape: tuple[int, ...] = (2, 8),
    zero_point_shape: tuple[int, ...] = (),
    a_shape: tuple[Any, ...] = ("M", 64),
    inputs: tuple[str, ...] = ("A", "a_scale", "a_zero_point", "B", "b_scale"),
    b_type: int = TensorProto.INT4,
    scale_type: int = TensorProto.FLOAT,
    a_type: int = TensorProto.UINT8,
    constant_b: bool = True,
    attributes: dict[str, Any] | None = None,
) -> bytes:
    """A model that need not be valid, which is why it is built on protobuf."""

    def zeros(name: str, dtype: int, shape: tuple[int, ...]) -> onnx.TensorProto:
        items = int(np.prod(shape))
        width = {TensorProto.INT4: 0.5, TensorProto.INT8: 1, TensorProto.UINT8: 1, TensorProto.DOUBLE: 8}.get(dtype, 4)
        return helper.make_tensor(name, dtype, shape, bytes(int(np.ceil(items * width))), raw=True)

    b = zeros("B", b_type, b_shape)
    graph_inputs = [
        helper.make_tensor_value_info("A", a_type, a_shape),
        helper.make_tensor_value_info("a_scale", TensorProto.FLOAT, None),
    ]
    initializers = [
        zeros("a_zero_point", TensorProto.UINT8, zero_point_shape),
        zeros("b_scale", scale_type, scale_shape),
    ]
    if constant_b:
        initializers.append(b)
    else:
        graph_inputs.append(helper.make_tensor_value_info("B", b_type, b_shape))
    given = {"block_size": 32} if attributes is None else attributes
    node = helper.make_node("W4A8MatMul", inputs, ["Y"], domain="fptq", name="layers.3.q_proj", **given)
    graph = helper.make_graph(
        [node], "g", graph_inputs, [helper.make_tensor_value_info("Y", scale_type, None)], initializers
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fptq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        ({"attributes": {}}, "'block_size' is missing or is not an integer. Set"),
        ({"attributes": {"block_size": 32.0}}, "'block_size' is missing or is not an integer. Set"),
        ({"attributes": {"block_size": [32]}}, "'block_size' is missing or is not an integer. Set"),
        ({"attributes": {"block_size": 0}}, "block_size is 0 but K is 64. Use 1..K"),
        ({"attributes": {"block_size": -1}}, "block_size is -1 but K is 64. Use 1..K"),
        ({"attributes": {"block_size": 65}}, "block_size is 65 but K is 64. Use 1..K"),
        ({"attributes": {"block_size": 16}}, r"b_scale must be \[4, 8\]"),
        ({"attributes": {"block_size": 32, "scale_max_multiple": 16}}, "scale_max_multiple is 16. Use 0"),
        ({"attributes": {"block_size": 32, "scale_max_multiple": -1}}, "scale_max_multiple is -1. Use 0"),
        ({"attributes": {"block_size": 32, "scale_max_multiple": 1.5}}, "'scale_max_multiple' is not an integer"),
        ({"b_shape": (64,)}, r"B has shape \[64\]. B must be \[K, N\]"),
        ({"b_shape": (4, 16, 8)}, r"B must be \[K, N\]"),
        ({"b_shape": (0, 8), "a_shape": ("M", 0)}, "K and N must be at least 1"),
        ({"b_shape": (64, 0)}, "K and N must be at least 1"),
        (
            {
                "a_shape": ("M", 2**21),
                "b_shape": (2**21, 1),
                "scale_shape": (1, 1),
                "attributes": {"block_size": 2**21},
            },
            "may overflow int32",
        ),
        ({"scale_shape": (16,)}, r"b_scale has shape \[16\]"),
        ({"scale_shape": (8, 2)}, r"b_scale must be \[2, 8\]"),
        ({"a_shape": ("M", 63)}, r"A has shape \[\?, 63\] but B is \[64, 8\]. A's last"),
        ({"zero_point_shape": (8,)}, r"a_zero_point has shape \[8\]. Give one"),
        ({"constant_b": False}, "input B is not a constant. Make it an initializer"),
    ],
)
def test_malformed_nodes_are_refused(malformed: dict[str, Any], message: str) -> None:
    """Each message names the node, what is wrong and what to do."""
    with pytest.raises(Exception, match=f"W4A8MatMul node 'layers.3.q_proj': .*{message}"):
        op_models.open_session(_onnx_model(**malformed))


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        ({"b_type": TensorProto.INT8}, r"tensor\(int8\).*of input parameter \(B\).*layers.3.q_proj"),
        ({"scale_type": TensorProto.DOUBLE}, r"tensor\(double\).*of input parameter \(b_scale\).*layers.3.q_proj"),
        ({"a_type": TensorProto.FLOAT}, r"tensor\(float\).*of input parameter \(A\).*layers.3.q_proj"),
        ({"inputs": ("A", "a_scale", "a_zero_point", "B")}, "layers.3.q_proj.*has input size 4 not in range"),
    ],
)
def test_malformed_types_are_refused_by_onnxruntime(malformed: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        op_models.open_session(_onnx_model(**malformed))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"A": np.zeros((2, 3), np.uint8), "a_scale": np.array(1, np.float32)}, r"A has shape \[2, 3\] but K is 64"),
        ({"A": np.zeros((2, 64), np.uint8), "a_scale": np.ones(3, np.float32)}, r"a_scale has shape \[3\] but A is"),
        ({"A": np.zeros((2, 64), np.uint8), "a_scale": np.ones((1, 2), np.float32)}, r"one per row, shape \[2, 1\]"),
        ({"A": np.array(1, np.uint8), "a_scale": np.array(1, np.float32)}, r"A has shape \[\]"),
    ],
)
def test_shapes_of_a_call_are_checked(feeds: dict[str, np.ndarray], message: str) -> None:
    model = op_models.matmul_model(np.zeros((64, 8), np.int8), np.ones((2, 8), np.float32), 32)
    session = op_models.open_session(model)
    with pytest.raises(Exception, match=f"node 'the_node': .*{message}"):
        session.run(None, feeds)


def test_node_builder_sets_type_and_shape() -> None:
    model = op_models.matmul_model(
        np.zeros((64, 8), np.int8), np.ones((2, 8), np.float16), 32, a_shape=["B", "S", 64], a_scale_shape=["B", "S", 1]
    )
    output = model.graph.outputs[0]
    assert output.dtype is op_models.DTYPES["float16"]
    assert [str(d) for d in output.shape] == ["B", "S", "8"]
    onnx.checker.check_model(op_models.ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize("multiple", [0, 15], ids=["float scales", "integer scales"])
def test_reference_evaluator_runs_the_function(multiple: int) -> None:
    """A tool that knows only standard ONNX gets the same numbers."""
    rng = np.random.default_rng(1)
    problem = op_models.random_problem(rng, [3], 50, 6, 16, "float32")
    scale = _integer_scales(rng, 4, 6, "float32") if multiple else problem["b_scale"]
    model = op_models.matmul_model(problem["b"], scale, 16, zero_point=3, scale_max_multiple=multiple)
    evaluator = ReferenceEvaluator(op_models.ir.serde.serialize_model(model))
    (y,) = evaluator.run(None, {"A": problem["a"], "a_scale": problem["a_scale"]})
    expected = w4a8_matmul.reference(problem["a"], problem["a_scale"], 3, problem["b"], scale, 16)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
