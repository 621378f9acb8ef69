"""DynamicQuantizePerToken: kernel, function body and reference give the same bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import op_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from onnx import TensorProto, helper

from fptq_onnx.ops import dynamic_quantize_per_token

DTYPES = ["float32", "float16", "bfloat16"]
NAN, INF = np.float32(np.nan), np.float32(np.inf)


def _feed(x: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        return {"X": x.astype(np.float32 if dtype == "bfloat16" else op_models.NUMPY_DTYPES[dtype])}


def _reference(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        return dynamic_quantize_per_token.reference(x.astype(op_models.NUMPY_DTYPES[dtype]))


SESSIONS: dict[tuple[str, bool], ort.InferenceSession] = {}


def _run(x: np.ndarray, dtype: str, library: bool = True) -> list[np.ndarray]:
    if (dtype, library) not in SESSIONS:
        SESSIONS[dtype, library] = op_models.open_session(op_models.quantize_model(dtype), library=library)
    return SESSIONS[dtype, library].run(None, _feed(x, dtype))


arrays = st_numpy.arrays(
    np.float32,
    st_numpy.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=40).filter(lambda s: np.prod(s) < 4000),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@settings(max_examples=300, deadline=None)
@given(arrays, st.sampled_from(DTYPES))
def test_kernel_equals_reference(x: np.ndarray, dtype: str) -> None:
    """Any float values, subnormals and float16 overflow included."""
    with np.errstate(over="ignore"):
        x = x.astype(op_models.NUMPY_DTYPES[dtype])
    y, scale = _run(x, dtype)
    expected_y, expected_scale = _reference(x, dtype)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(y, expected_y)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.integers(0, 9), st.sampled_from(DTYPES))
def test_kernel_equals_reference_on_long_rows(seed: int, k: int, rows: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * np.exp(rng.normal(size=(rows, 1)) * 4)).astype(np.float32)
    y, scale = _run(x, dtype)
    expected_y, expected_scale = _reference(x, dtype)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(y, expected_y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_round_to_even(dtype: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127]], dtype=np.float32)
    y, scale = _run(x, dtype)
    assert scale.item() == 1
    np.testing.assert_array_equal(y.astype(int)[0] - 128, [127, 0, 2, 2, 0, -2, -2, 126, -127])


@pytest.mark.parametrize("library", [True, False], ids=["kernel", "body"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_are_marked(dtype: str, library: bool) -> None:
    """Such a row gets scale NaN and the zero point, its neighbours are not touched; a row of zeros gets scale 1."""
    x = np.zeros((7, 33), dtype=np.float32)
    x[0, 32], x[1, 0], x[2, 17] = NAN, INF, -INF
    x[3, :], x[4, 5], x[5] = NAN, -2.54, np.linspace(-1, 1, 33)
    y, scale = _run(x, dtype, library)
    assert np.isnan(scale[:4]).all()
    assert (y[:4] == 128).all()
    assert scale[6].item() == 1
    expected_y, expected_scale = _reference(x, dtype)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(scale, expected_scale)


def test_values_below_one_step_of_subnormals_are_clamped() -> None:
    """The scale is rounded so coarsely there that x / scale leaves the range."""
    tiny = np.float32(1.4e-45)
    x = np.array([[189, 1, -189], [60, 1, 0]], dtype=np.float32) * tiny
    y, scale = _run(x, "float32")
    np.testing.assert_array_equal(scale[:, 0], np.array([tiny, 1], np.float32))
    np.testing.assert_array_equal(y, [[255, 129, 1], [128, 128, 128]])


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_function_body_equals_reference(dtype: str, level: str) -> None:
    rng = np.random.default_rng(0)
    model = op_models.quantize_model(dtype)
    for shape in [(65,), (3, 64), (2, 3, 129), (0, 4), (1, 2, 1, 8)]:
        x = (rng.standard_normal(shape) * 3).astype(np.float32)
        optimization = getattr(ort.GraphOptimizationLevel, level)
        y, scale = op_models.run(model, _feed(x, dtype), library=False, level=optimization)
        expected_y, expected_scale = _reference(x, dtype)
        np.testing.assert_array_equal(scale, expected_scale)
        np.testing.assert_array_equal(y, expected_y)


def test_shape_inference() -> None:
    model = op_models.quantize_model("float32", ["batch", 4, 64])
    for output in model.graph.outputs:
        output.shape = None
    quantized, scale = op_models.open_session(model).get_outputs()
    assert (quantized.type, quantized.shape) == ("tensor(uint8)", ["batch", 4, 64])
    assert (scale.type, scale.shape) == ("tensor(float)", ["batch", 4, 1])


def test_node_builder_sets_types_and_shapes() -> None:
    model = op_models.quantize_model("float16", ["batch", 64])
    assert [str(d) for d in model.graph.outputs[1].shape] == ["batch", "1"]
    onnx.checker.check_model(op_models.ir.serde.serialize_model(model), full_check=True)


def _raw_model(shape: list[int], dtype: int = TensorProto.FLOAT) -> bytes:
    node = helper.make_node("DynamicQuantizePerToken", ["X"], ["Y", "scale"], domain="fptq", name="block.0.q")
    outputs = [
        helper.make_tensor_value_info("Y", TensorProto.UINT8, None),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("X", dtype, shape)], outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fptq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_malformed_nodes_are_refused() -> None:
    with pytest.raises(Exception, match=r"DynamicQuantizePerToken node 'block.0.q': X has shape \[3, 0\]. X must be"):
        op_models.open_session(_raw_model([3, 0]))
    with pytest.raises(Exception, match=r"tensor\(int32\).*of input parameter \(X\).*block.0.q"):
        op_models.open_session(_raw_model([3, 4], TensorProto.INT32))
    with pytest.raises(Exception, match=r"node 'q': X has shape \[\]. X must be \[..., K\]"):
        op_models.run(op_models.quantize_model("float32"), {"X": np.array(1, dtype=np.float32)})


def test_bfloat16_reference_reads_ml_dtypes() -> None:
    y, scale = dynamic_quantize_per_token.reference(np.array([[1.0, -0.5]], dtype=ml_dtypes.bfloat16))
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(y, [[255, 128 - 64]])
