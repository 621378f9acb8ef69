"""DynamicQuantizeW4A8MatMul: the bytes of the two ops it stands for, its function bodies, and refusals by name."""

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

from fptq_onnx.ops import dynamic_quantize_w4a8_matmul, w4a8_matmul

DTYPES = list(op_models.DTYPES)
LEVELS = ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
NAN, INF = np.float32(np.nan), np.float32(np.inf)
# K, N and block size: odd ones, more than a tile, an int4 matrix that ends in half a byte.
SHAPES = [(64, 32, 32), (256, 48, 128), (256, 16, 256), (100, 37, 32), (301, 5, 100), (7, 3, 7), (21, 5, 1)]


def _scales(rng: np.random.Generator, k: int, n: int, block: int, dtype: str, structured: bool) -> np.ndarray:
    """Group scales; structured ones are base[n] * i, with bases of few bits so that they are exact in every type."""
    shape = (-(-k // block), n)
    sign = rng.choice([-1, 1], shape)
    if not structured:
        return (rng.uniform(0.005, 0.02, shape) * sign).astype(op_models.NUMPY_DTYPES[dtype])
    base = np.ldexp(rng.integers(8, 16, n), rng.integers(-12, -8, n))
    return (base * rng.integers(1, 16, shape) * sign).astype(op_models.NUMPY_DTYPES[dtype])


def _activations(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values that are exact in the type, as it can be fed: float32 for bfloat16."""
    x = (rng.standard_normal(shape) * rng.choice([0.01, 1, 40], (*shape[:-1], 1))).astype(np.float32)
    typed = x.astype(op_models.NUMPY_DTYPES[dtype])
    return typed.astype(np.float32) if dtype == "bfloat16" else typed


def _models(
    rng: np.random.Generator, k: int, n: int, block: int, dtype: str, structured: bool
) -> tuple[op_models.ir.Model, op_models.ir.Model]:
    """The op, and the two ops on the same operands."""
    operands = rng.integers(-8, 8, (k, n), dtype=np.int8), _scales(rng, k, n, block, dtype, structured), block, dtype
    one, two = (
        op_models.dynamic_matmul_model(*operands, scale_max_multiple=15 if structured else 0, fused=fused)
        for fused in (True, False)
    )
    return one, two


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """Shape of X (rank 1 to 4, no rows included), N and a block size."""
    rows = draw(st.lists(st.integers(0, 9), max_size=3))
    k, n = draw(st.integers(1, 200)), draw(st.integers(1, 70))
    block = draw(st.one_of(st.sampled_from([8, 16, 32, 64, 128]), st.integers(1, 200)))
    return (*rows, k), n, min(block, k)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**32 - 1))
def test_bytes_are_those_of_the_two_ops(
    shape: tuple[tuple[int, ...], int, int], dtype: str, structured: bool, seed: int
) -> None:
    (*rows, k), n, block = shape
    rng = np.random.default_rng(seed)
    one, two = _models(rng, k, n, block, dtype, structured)
    x = _activations(rng, (*rows, k), dtype)
    (y,), (expected,) = (op_models.run(model, {"X": x}) for model in (one, two))
    assert y.shape == (*rows, n) and y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("structured", [False, True], ids=["float-scales", "integer-structured"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference_on_every_instruction_set(
    dtype: str, structured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one row to more than the rows of a panel, with threads; bytes equal the two ops' on the same kernels."""
    k, n, block = 421, 83, 128
    rng = np.random.default_rng(0)
    one, two = _models(rng, k, n, block, dtype, structured)
    b, b_scale = (one.graph.initializers[name].const_value.numpy() for name in ("B", "b_scale"))
    for rows in (1, 5, 16, 40, 600):
        x = _activations(rng, (rows, k), dtype)
        typed = x.astype(op_models.NUMPY_DTYPES[dtype])
        expected = dynamic_quantize_w4a8_matmul.reference(typed, b.astype(np.int8), b_scale, block)
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        results = {}
        for name in op_models.available_kernels():
            monkeypatch.setenv(op_models.ISA_VARIABLE, name)
            (results[name],) = op_models.run(one, {"X": x}, threads=2)
            error = np.abs(results[name].astype(np.float64) - expected)
            assert np.all(error <= (2e-6 + op_models.ROUNDING[dtype]) * largest), name
            np.testing.assert_array_equal(results[name], op_models.run(two, {"X": x}, threads=2)[0], err_msg=name)
            if structured:
                np.testing.assert_array_equal(results[name], next(iter(results.values())), err_msg=name)
        monkeypatch.delenv(op_models.ISA_VARIABLE)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n", "block"), SHAPES)
def test_function_bodies(k: int, n: int, block: int, dtype: str, level: str) -> None:
    """Integer-structured scales give the kernel's bytes, float scales agree within their sums' rounding."""
    rng = np.random.default_rng(k)
    x = _activations(rng, (2, 3, k), dtype)
    for structured in (True, False):
        model, _ = _models(rng, k, n, block, dtype, structured)
        (kernel,) = op_models.run(model, {"X": x})
        optimization = getattr(ort.GraphOptimizationLevel, level)
        (body,) = op_models.run(model, {"X": x}, library=False, level=optimization)
        if structured:
            np.testing.assert_array_equal(body, kernel)
        else:
            largest = np.abs(kernel.astype(np.float64)).max(axis=-1, keepdims=True)
            error = np.abs(body.astype(np.float64) - kernel.astype(np.float64))
            assert np.all(error <= max(1e-4, 2.1 * op_models.ROUNDING[dtype]) * largest)
        assert np.abs(kernel.astype(np.float64)).max() > 0


def test_function_bodies_pass_the_checker() -> None:
    for structured in (True, False):
        model = op_models.dynamic_matmul_model(
            np.zeros((64, 8), np.int8),
            np.ones((2, 8), np.float32),
            32,
            "float32",
            scale_max_multiple=15 if structured else 0,
            shape=["batch", 64],
        )
        onnx.checker.check_model(op_models.ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize("library", [True, False], ids=["kernel", "body"])
@pytest.mark.parametrize("structured", [True, False], ids=["integer-structured", "float-scales"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_zero_or_not_finite(dtype: str, structured: bool, library: bool) -> None:
    """Zero rows give zeros, rows with NaN or infinity give NaN, and their neighbours are not touched."""
    rng = np.random.default_rng(4)
    model, _ = _models(rng, 33, 9, 16, dtype, structured)
    x = _activations(rng, (7, 33), dtype)
    (plain,) = op_models.run(model, {"X": x}, library=library)
    x[0], x[1, 32], x[2, 0], x[4, 17], x[5] = 0, NAN, INF, -INF, NAN
    (y,) = op_models.run(model, {"X": x}, library=library)
    bad, zero = [1, 2, 4, 5], 0
    assert np.isnan(y[bad]).all()
    assert (y[zero] == 0).all()
    np.testing.assert_array_equal(y[[3, 6]], plain[[3, 6]])
    assert np.isfinite(plain).all()


def test_the_last_nibble_is_read() -> None:
    """An odd number of weights ends in half a byte; the one in it counts."""
    b = np.zeros((3, 3), np.int8)
    b[2, 2] = -8
    model = op_models.dynamic_matmul_model(b, np.ones((1, 3), np.float32), 3, "float32")
    (y,) = op_models.run(model, {"X": np.array([[0, 0, 127]], np.float32)})
    np.testing.assert_array_equal(y, [[0, 0, -8 * 127]])


def test_calls_at_the_same_time_share_nothing() -> None:
    """Threads call one session with their own activations; each gets the bytes of a call alone."""
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(6)
    model, _ = _models(rng, 512, 96, 128, "float32", False)
    session = op_models.open_session(model, threads=2)
    inputs = [_activations(rng, (rows, 512), "float32") for rows in (1, 7, 40, 200)]
    expected = [session.run(None, {"X": x})[0] for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(10):
            results = pool.map(lambda x: session.run(None, {"X": x})[0], inputs)
            for result, wanted in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["batch", "sequence", 64], ["batch", "sequence", 8]),
        ([2, 3, 64], [2, 3, 8]),
        ([64], [8]),
        (["batch", "hidden"], ["batch", 8]),
    ],
)
def test_shape_inference(shape: list[Any], expected: list[Any]) -> None:
    model = op_models.dynamic_matmul_model(
        np.zeros((64, 8), np.int8), np.ones((2, 8), np.float16), 32, "float16", shape=shape
    )
    assert [size if isinstance(size, int) else size.value for size in model.graph.outputs[0].shape] == expected
    model.graph.outputs[0].shape = None
    (output,) = op_models.open_session(model).get_outputs()
    assert (output.type, output.shape) == ("tensor(float16)", expected)


def test_broken_promise_of_the_scales_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    b, scale = rng.integers(-8, 8, (256, 20), dtype=np.int8), rng.uniform(0.5, 2, (4, 20)).astype(np.float32)
    model = op_models.dynamic_matmul_model(b, scale, 64, "float32", scale_max_multiple=15)
    session = op_models.open_session(model, severity=2)
    wanted = "fptq.DynamicQuantizeW4A8MatMul node 'the_node': scale_max_multiple is 15 but b_scale is not of that form"
    assert wanted in capfd.readouterr().err
    x = _activations(rng, (5, 256), "float32")
    expected = dynamic_quantize_w4a8_matmul.reference(x, b, scale, 64)
    np.testing.assert_allclose(session.run(None, {"X": x})[0], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def _onnx_model(
    *,
    x_shape: tuple[Any, ...] | None = ("M", 64),
    x_type: int = TensorProto.FLOAT,
    b_shape: tuple[int, ...] = (64, 8),
    b_type: int = TensorProto.INT4,
    scale_shape: tuple[int, ...] = (2, 8),
    scale_type: int = TensorProto.FLOAT,
    inputs: tuple[str, ...] = ("X", "B", "b_scale"),
    variable: str | None = None,
    attributes: dict[str, Any] | None = None,
) -> bytes:
    """A model that need not be valid, which is why it is built on protobuf."""

    def zeros(name: str, dtype: int, shape: tuple[int, ...]) -> onnx.TensorProto:
        width = {TensorProto.INT4: 0.5, TensorProto.INT8: 1, TensorProto.FLOAT16: 2}.get(dtype, 4)
        return helper.make_tensor(name, dtype, shape, bytes(int(np.ceil(np.prod(shape) * width))), raw=True)

    initializers = [zeros("B", b_type, b_shape), zeros("b_scale", scale_type, scale_shape)]
    graph_inputs = [helper.make_tensor_value_info("X", x_type, x_shape)]
    for tensor in [tensor for tensor in initializers if tensor.name == variable]:
        initializers.remove(tensor)
        graph_inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    given = {"block_size": 32} if attributes is None else attributes
    node = helper.make_node("DynamicQuantizeW4A8MatMul", inputs, ["Y"], domain="fptq", name="layers.3.o_proj", **given)
    outputs = [helper.make_tensor_value_info("Y", scale_type, None)]
    graph = helper.make_graph([node], "g", graph_inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fptq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        ({"attributes": {}}, "'block_size' is missing or is not an integer. Set"),
        ({"attributes": {"block_size": 0}}, "block_size is 0 but K is 64. Use 1..K"),
        ({"attributes": {"block_size": 65}}, "block_size is 65 but K is 64. Use 1..K"),
        ({"attributes": {"block_size": 16}}, r"b_scale must be \[4, 8\]"),
        ({"attributes": {"block_size": 32, "scale_max_multiple": 16}}, "scale_max_multiple is 16. Use 0"),
        ({"attributes": {"block_size": 32, "scale_max_multiple": 1.5}}, "'scale_max_multiple' is not an integer"),
        ({"b_shape": (64,)}, r"B has shape \[64\]. B must be \[K, N\]"),
        ({"b_shape": (64, 0)}, "K and N must be at least 1"),
        (
            {
                "x_shape": ("M", 2**21),
                "b_shape": (2**21, 1),
                "scale_shape": (1, 1),
                "attributes": {"block_size": 2**21},
            },
            "may overflow int32",
        ),
        ({"scale_shape": (8, 2)}, r"b_scale must be \[2, 8\]"),
        ({"x_shape": ("M", 63)}, r"X has shape \[\?, 63\] but B is \[64, 8\]. X's last"),
        ({"variable": "B"}, "input B is not a constant. Make it an initializer"),
        ({"variable": "b_scale"}, "input b_scale is not a constant. Make it an initializer"),
    ],
)
def test_malformed_nodes_are_refused(malformed: dict[str, Any], message: str) -> None:
    """Each message names the node, what is wrong and what to do."""
    with pytest.raises(Exception, match=f"DynamicQuantizeW4A8MatMul node 'layers.3.o_proj': .*{message}"):
        op_models.open_session(_onnx_model(**malformed))


@pytest.mark.parametrize("shape", [(), (3, 63)])
def test_activations_of_another_shape_are_refused_at_call(shape: tuple[int, ...]) -> None:
    session = op_models.open_session(_onnx_model(x_shape=None))
    text = ", ".join(map(str, shape))
    with pytest.raises(Exception, match=rf"node 'layers.3.o_proj': X has shape \[{text}\] but K is 64. X's last"):
        session.run(None, {"X": np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        ({"b_type": TensorProto.INT8}, r"tensor\(int8\).*of input parameter \(B\).*layers.3.o_proj"),
        ({"x_type": TensorProto.UINT8}, r"tensor\(uint8\).*of input parameter \(X\).*layers.3.o_proj"),
        ({"x_type": TensorProto.FLOAT16}, "layers.3.o_proj"),
        ({"inputs": ("X", "B")}, "layers.3.o_proj.*has input size 2 not in range"),
    ],
)
def test_malformed_types_are_refused_by_onnxruntime(malformed: dict[str, Any], message: str) -> None:
    """Among them an activation of another type than the scales."""
    with pytest.raises(Exception, match=message):
        op_models.open_session(_onnx_model(**malformed))


def test_node_of_structured_scales_has_the_body_in_integers() -> None:
    for multiple, overload in ((0, ""), (15, w4a8_matmul.INTEGER_SCALES)):
        model = op_models.dynamic_matmul_model(
            np.zeros((64, 8), np.int8), np.ones((2, 8), np.float32), 32, "float32", scale_max_multiple=multiple
        )
        assert list(model.functions) == [("fptq", "DynamicQuantizeW4A8MatMul", overload)]
