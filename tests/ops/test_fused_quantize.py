"""RMSNorm and SiLU that end in uint8: kernels of every instruction set, function body, reference, unfused graph."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import op_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.ops import fused_quantize
from fptq_onnx.ops.fused_quantize import StaticTarget

DTYPES = ["float32", "float16", "bfloat16"]
OPS = list(fused_quantize.FUNCTIONS)
EPSILON = 1e-5
STATIC = (0.043, 117)


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    scale = np.exp(rng.normal(size=(*shape[:-1], 1)))
    return (rng.standard_normal(shape) * scale).astype(np.float32).astype(op_models.NUMPY_DTYPES[dtype])


def _problem(op: str, rows: list[int], k: int, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = {"RMSNorm": ["X"], "SkipRMSNorm": ["X", "skip"], "SiluMul": ["gate", "up"]}[_stem(op)]
    problem = {name: _values(rng, (*rows, k), dtype) for name in names}
    if "Norm" in op:
        problem["weight"] = rng.uniform(-2, 2, k).astype(op_models.NUMPY_DTYPES[dtype])
    return problem


def _stem(op: str) -> str:
    return op.removesuffix("Quantize").removesuffix("Dynamic")


def _model(op: str, problem: dict[str, np.ndarray], dtype: str, shape: list[Any] | None = None) -> ir.Model:
    """The op on float32 inputs, cast to T in the graph (numpy's bfloat16 cannot be fed)."""
    nodes, inputs, operands = [], [], []
    for name in problem:
        declared = shape if name != "weight" else [None]
        inputs.append(op_models.value(name, ir.DataType.FLOAT, declared))
        cast = ir.node("Cast", [inputs[-1]], attributes={"to": op_models.DTYPES[dtype]})
        cast.outputs[0].name = f"{name}_T"
        cast.outputs[0].type = ir.TensorType(op_models.DTYPES[dtype])
        cast.outputs[0].shape = inputs[-1].shape
        nodes.append(cast)
        operands.append(cast.outputs[0])
    constants, target = [], None
    if "Dynamic" not in op:
        constants = [
            op_models.constant("y_scale", np.array(STATIC[0], np.float32)),
            op_models.constant("y_zero_point", np.array(STATIC[1], np.uint8)),
        ]
        target = StaticTarget(*constants)
    if "Silu" in op:
        node = fused_quantize.silu_mul_quantize(*operands, target, name="the_node")
    else:
        x, *skip, weight = operands
        node = fused_quantize.rms_norm_quantize(
            x, weight, target, epsilon=EPSILON, skip=skip[0] if skip else None, name="the_node"
        )
    assert node.op_type == op
    nodes.append(node)
    outputs = list(node.outputs)
    for i, output in enumerate(outputs):
        output.name = f"output_{i}"
    if "Skip" in op:
        cast = ir.node("Cast", [outputs[-1]], attributes={"to": ir.DataType.FLOAT})
        cast.outputs[0].name = "sum_float"
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), outputs[-1].shape
        nodes.append(cast)
        outputs[-1] = cast.outputs[0]
    return op_models.model_of(nodes, inputs, constants, outputs)


def _run(op: str, problem: dict[str, np.ndarray], dtype: str, **options: Any) -> list[np.ndarray]:
    feeds = {name: array.astype(np.float32) for name, array in problem.items()}
    return op_models.run(_model(op, problem, dtype), feeds, **options)


def _reference(op: str, problem: dict[str, np.ndarray]) -> list[np.ndarray]:
    static = None if "Dynamic" in op else STATIC
    if "Silu" in op:
        result = fused_quantize.silu_mul_reference(problem["gate"], problem["up"], static=static)
    else:
        result = fused_quantize.rms_norm_reference(
            problem["X"], problem["weight"], EPSILON, skip=problem.get("skip"), static=static
        )
    return [array for array in (result.y, result.scale, result.sum) if array is not None]


def _assert_close(op: str, dtype: str, got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Equal but for values on a rounding border: of a step of T before quantization, or of uint8."""
    assert len(got) == len(expected)
    step = 2.1 * op_models.ROUNDING[dtype] + 1e-6
    y, expected_y = got[0].astype(int), expected[0].astype(int)
    assert y.shape == expected_y.shape
    difference = np.abs(y - expected_y)
    # One code apart at most, and only for a share of values as large as the uncertain part of a code.
    assert difference.max(initial=0) <= 1
    assert difference.sum() <= 2 + 256 * step * difference.size
    for array, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(array, other.astype(np.float32), rtol=step)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(OPS),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_kernel_agrees_with_the_reference(op: str, rows: list[int], k: int, dtype: str, seed: int) -> None:
    problem = _problem(op, rows, k, dtype, seed)
    got, expected = _run(op, problem, dtype), _reference(op, problem)
    if "Silu" in op:
        _assert_close(op, dtype, got, expected)
    else:
        for array, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(array, other.astype(array.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_all_kernels_give_the_same_bytes(op: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, k in (([9], 611), ([300], 64)):
        problem = _problem(op, rows, k, dtype)
        results = {}
        for name in op_models.available_kernels():
            monkeypatch.setenv(op_models.ISA_VARIABLE, name)
            results[name] = _run(op, problem, dtype, threads=2)
        for name, result in results.items():
            for array, other in zip(result, results["portable"], strict=True):
                np.testing.assert_array_equal(array, other, err_msg=name)


@pytest.mark.parametrize("rows", [[], [0], [2, 0, 3], [2, 3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_function_body_agrees_with_the_kernel(op: str, dtype: str, rows: list[int]) -> None:
    problem = _problem(op, rows, 200, dtype)
    body, kernel = _run(op, problem, dtype, library=False), _run(op, problem, dtype)
    _assert_close(op, dtype, body, kernel)


@pytest.mark.parametrize("op", [op for op in OPS if "Dynamic" in op])
def test_rows_that_are_not_finite_give_nan(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(op, [3], 40, "float32")
    next(iter(problem.values()))[0, 7] = np.nan
    next(iter(problem.values()))[1, 7] = np.inf
    for name in op_models.available_kernels():
        monkeypatch.setenv(op_models.ISA_VARIABLE, name)
        y, scale, *_ = _run(op, problem, "float32")
        np.testing.assert_array_equal(np.isnan(scale)[:, 0], [True, True, False])
        np.testing.assert_array_equal(y[:2], 128)


def test_large_gates_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = np.array([[-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0]], np.float32)
    problem = {"gate": gate, "up": np.ones_like(gate)}
    for name in op_models.available_kernels():
        monkeypatch.setenv(op_models.ISA_VARIABLE, name)
        (y,) = _run("SiluMulQuantize", problem, "float32")
        np.testing.assert_array_equal(y[0], [117, 117, 117, 117, 117, 255, 255, 255], err_msg=name)


@pytest.mark.parametrize("op", OPS)
def test_shapes_are_inferred_and_pass_the_checker(op: str) -> None:
    problem = _problem(op, [2, 3], 64, "float16")
    model = _model(op, problem, "float16", ["batch", "sequence", 64])
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    for output in model.graph.outputs:
        output.shape = None
    shapes = [output.shape for output in op_models.open_session(model).get_outputs()]
    assert shapes[0] == ["batch", "sequence", 64]
    if "Dynamic" in op:
        assert shapes[1] == ["batch", "sequence", 1]
    if "Skip" in op:
        assert shapes[-1] == ["batch", "sequence", 64]


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("SkipRMSNormQuantize", {"skip": (2, 63)}, r"input 1 has shape \[2, 63\] but the first has \[2, 64\]"),
        ("SkipRMSNormQuantize", {"skip": (1, 64)}, r"input 1 has shape \[1, 64\].* It must be \[2, 64\]"),
        ("RMSNormQuantize", {"weight": (63,)}, r"input 1 has shape \[63\] .* It must be \[64\]"),
        ("SiluMulDynamicQuantize", {"up": (2, 2)}, r"input 1 has shape \[2, 2\]"),
        ("SiluMulQuantize", {"gate": ()}, r"the first input has shape \[\]"),
    ],
)
def test_shapes_of_a_call_are_checked(op: str, change: dict[str, tuple[int, ...]], message: str) -> None:
    problem = _problem(op, [2], 64, "float32")
    model = _model(op, problem, "float32")
    feeds = problem | {name: np.zeros(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(Exception, match=f"{op} node 'the_node': .*{message}"):
        op_models.open_session(model).run(None, feeds)


@pytest.mark.parametrize(
    ("epsilon", "message"), [(None, "'epsilon' is missing"), (-1.0, "epsilon is -1"), (1, "'epsilon' is missing")]
)
def test_epsilon_is_checked(epsilon: float | None, message: str) -> None:
    model = _model("RMSNormDynamicQuantize", _problem("RMSNormDynamicQuantize", [2], 64, "float32"), "float32")
    node = next(node for node in model.graph if node.domain == "fptq")
    del node.attributes["epsilon"]
    if epsilon is not None:
        node.attributes.add(ir.AttrInt64("epsilon", 1) if epsilon == 1 else ir.AttrFloat32("epsilon", epsilon))
    with pytest.raises(Exception, match=f"RMSNormDynamicQuantize node 'the_node': .*{message}"):
        op_models.open_session(model)


def test_values_of_bfloat16_are_numbers_of_bfloat16() -> None:
    """The sum that goes on along the residual stream is rounded to T."""
    problem = _problem("SkipRMSNormQuantize", [4], 32, "bfloat16")
    total = _run("SkipRMSNormQuantize", problem, "bfloat16")[-1]
    np.testing.assert_array_equal(total, total.astype(ml_dtypes.bfloat16).astype(np.float32))
