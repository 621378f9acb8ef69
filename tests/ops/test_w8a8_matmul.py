"""W8A8MatMul: kernels of every instruction set, function body and reference give the same bytes."""

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

from fptq_onnx.ops import w8a8_matmul

LEVELS = [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]
DTYPES = ["float32", "float16", "bfloat16"]


def _problem(seed: int, rows: list[int], k: int, n: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (*rows, k), np.uint8)
    b = rng.integers(-128, 128, (k, n), np.int8)
    if seed % 4 == 0:  # all operands at the ends of their ranges
        a, b = np.where(a < 128, 0, 255).astype(np.uint8), np.where(b < 0, -128, 127).astype(np.int8)
    scale = rng.uniform(0.001, 0.02, n) * rng.choice([-1, 1], n)
    return {
        "a": a,
        "a_scale": rng.uniform(0.01, 0.1, (*rows, 1)).astype(np.float32),
        "b": b,
        "b_scale": scale.astype(op_models.NUMPY_DTYPES[dtype]),
    }


def _check(problem: dict[str, Any], zero_point: int, per_token: bool, **options: Any) -> None:
    a_scale = problem["a_scale"] if per_token else np.array([0.37], np.float32)
    model = op_models.int8_matmul_model(problem["b"], problem["b_scale"], zero_point=zero_point)
    (y,) = op_models.run(model, {"A": problem["a"], "a_scale": a_scale}, **options)
    expected = w8a8_matmul.reference(problem["a"], a_scale, zero_point, problem["b"], problem["b_scale"])
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y, expected.astype(y.dtype))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 200),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.integers(0, 255),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_kernel_equals_reference(
    rows: list[int], k: int, n: int, dtype: str, zero_point: int, per_token: bool, seed: int
) -> None:
    _check(_problem(seed, rows, k, n, dtype), zero_point, per_token)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "n"), [([], 7, 3), ([0], 40, 9), ([2, 0, 3], 40, 9), ([1], 64, 32), ([2, 3], 300, 37)]
)
def test_function_body_equals_reference(
    rows: list[int], k: int, n: int, dtype: str, level: ort.GraphOptimizationLevel
) -> None:
    _check(_problem(k + n, rows, k, n, dtype), 77, True, library=False, level=level)


@pytest.mark.parametrize("zero_point", [128, 0, 201])
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 64, 300])
def test_all_kernels_equal_the_reference(rows: int, zero_point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in op_models.available_kernels():
        monkeypatch.setenv(op_models.ISA_VARIABLE, name)
        for k, n in ((416, 83), (576, 64)):
            _check(_problem(rows, [rows], k, n, "float32"), zero_point, True, threads=2)


def test_longest_sums_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All activations 255 (zero point 0) and all weights -128 give the largest magnitude."""
    k = 65_535
    model = op_models.int8_matmul_model(np.full((k, 2), -128, np.int8), np.ones(2, np.float32), zero_point=0)
    for name in op_models.available_kernels():
        monkeypatch.setenv(op_models.ISA_VARIABLE, name)
        (y,) = op_models.run(model, {"A": np.full((1, k), 255, np.uint8), "a_scale": np.array(1, np.float32)})
        np.testing.assert_array_equal(y, np.full((1, 2), -128 * 255 * k, np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("a_shape", "expected"),
    [(["batch", "sequence", 64], ["batch", "sequence", 8]), ([2, 3, 64], [2, 3, 8]), ([64], [8])],
)
def test_shape_inference(a_shape: list[Any], expected: list[Any]) -> None:
    model = op_models.int8_matmul_model(
        np.zeros((64, 8), np.int8), np.ones(8, np.float16), a_shape=a_shape, a_scale_shape=[1]
    )
    assert model.graph.outputs[0].dtype is op_models.DTYPES["float16"]
    onnx.checker.check_model(op_models.ir.serde.serialize_model(model), full_check=True)
    model.graph.outputs[0].shape = None
    assert op_models.open_session(model).get_outputs()[0].shape == expected


def _onnx_model(
    *,
    b_shape: tuple[int, ...] = (64, 8),
    scale_shape: tuple[int, ...] = (8,),
    zero_point_shape: tuple[int, ...] = (),
    a_shape: tuple[Any, ...] = ("M", 64),
    constant_b: bool = True,
) -> bytes:
    """A model that need not be valid."""

    def zeros(name: str, dtype: int, shape: tuple[int, ...], width: int) -> onnx.TensorProto:
        return helper.make_tensor(name, dtype, shape, bytes(int(np.prod(shape)) * width), raw=True)

    inputs = [
        helper.make_tensor_value_info("A", TensorProto.UINT8, a_shape),
        helper.make_tensor_value_info("a_scale", TensorProto.FLOAT, None),
    ]
    initializers = [
        zeros("a_zero_point", TensorProto.UINT8, zero_point_shape, 1),
        zeros("b_scale", TensorProto.FLOAT, scale_shape, 4),
    ]
    if constant_b:
        initializers.append(zeros("B", TensorProto.INT8, b_shape, 1))
    else:
        inputs.append(helper.make_tensor_value_info("B", TensorProto.INT8, b_shape))
    node = helper.make_node(
        "W8A8MatMul", ["A", "a_scale", "a_zero_point", "B", "b_scale"], ["Y"], domain="fptq", name="lm_head"
    )
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fptq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        ({"b_shape": (64,)}, r"B has shape \[64\]. B must be \[K, N\]"),
        ({"b_shape": (0, 8), "a_shape": ("M", 0)}, "K and N must be at least 1"),
        ({"b_shape": (65536, 8), "a_shape": ("M", 65536)}, "K is 65536, .* overflow int32. Use at most 65535"),
        ({"scale_shape": (1, 8)}, r"b_scale has shape \[1, 8\] but B is \[64, 8\]. b_scale must be \[8\]"),
        ({"a_shape": ("M", 63)}, r"A has shape \[\?, 63\] but B is \[64, 8\]. A's last"),
        ({"zero_point_shape": (8,)}, r"a_zero_point has shape \[8\]. Give one"),
        ({"constant_b": False}, "input B is not a constant. Make it an initializer"),
    ],
)
def test_malformed_nodes_are_refused(malformed: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=f"W8A8MatMul node 'lm_head': .*{message}"):
        op_models.open_session(_onnx_model(**malformed))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"A": np.zeros((2, 3), np.uint8), "a_scale": np.array(1, np.float32)}, r"A has shape \[2, 3\] but K is 64"),
        ({"A": np.zeros((2, 64), np.uint8), "a_scale": np.ones(3, np.float32)}, r"a_scale has shape \[3\] but A is"),
    ],
)
def test_shapes_of_a_call_are_checked(feeds: dict[str, np.ndarray], message: str) -> None:
    session = op_models.open_session(op_models.int8_matmul_model(np.zeros((64, 8), np.int8), np.ones(8, np.float32)))
    with pytest.raises(Exception, match=f"node 'the_node': .*{message}"):
        session.run(None, feeds)


def test_reference_evaluator_runs_the_function() -> None:
    problem = _problem(1, [3], 50, 6, "float32")
    model = op_models.int8_matmul_model(problem["b"], problem["b_scale"], zero_point=3)
    (y,) = ReferenceEvaluator(op_models.ir.serde.serialize_model(model)).run(
        None, {"A": problem["a"], "a_scale": problem["a_scale"]}
    )
    expected = w8a8_matmul.reference(problem["a"], problem["a_scale"], 3, problem["b"], problem["b_scale"])
    np.testing.assert_array_equal(y, expected)
