"""The CPU kernels of every instruction set, chosen through FPTQ_CPU_ISA."""

from __future__ import annotations

import numpy as np
import op_models
import pytest

from fptq_onnx.ops import dynamic_quantize_per_token, w4a8_matmul


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(op_models.ISA_VARIABLE, "abacus")
    with pytest.raises(Exception, match=r"FPTQ_CPU_ISA is 'abacus', which .* Use one of: .*portable"):
        op_models.open_session(op_models.quantize_model("float32"))


@pytest.mark.parametrize("structured", [False, True], ids=["float-scales", "integer-structured"])
@pytest.mark.parametrize("zero_point", [128, 0, 201])
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 64, 300])
def test_all_kernels_give_the_reference(
    rows: int, zero_point: int, structured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through onnxruntime, with every path forced; integer-structured results are equal to the last bit."""
    k, n, block = 416, 83, 128
    rng = np.random.default_rng(rows)
    problem = op_models.random_problem(rng, [rows], k, n, block, "float32")
    if structured:
        base = rng.integers(1, 2**10, (1, n)) * 2.0**-14
        problem["b_scale"] = (base * rng.integers(-15, 16, problem["b_scale"].shape)).astype(np.float32)
    multiple = 15 if structured else 0
    model = op_models.matmul_model(
        problem["b"], problem["b_scale"], block, zero_point=zero_point, scale_max_multiple=multiple
    )
    feeds = {"A": problem["a"], "a_scale": problem["a_scale"]}
    expected = w4a8_matmul.reference(
        problem["a"], problem["a_scale"], zero_point, problem["b"], problem["b_scale"], block
    )
    scale = np.abs(expected).max()
    results = {}
    for name in op_models.available_kernels():
        monkeypatch.setenv(op_models.ISA_VARIABLE, name)
        (results[name],) = op_models.run(model, feeds, threads=2)
        np.testing.assert_allclose(results[name], expected, rtol=0, atol=2e-6 * scale, err_msg=name)
    if structured:
        for name, result in results.items():
            np.testing.assert_array_equal(result, results["portable"], err_msg=name)


def test_scales_that_are_not_structured_still_give_the_reference(capfd: pytest.CaptureFixture[str]) -> None:
    """The attribute is a promise that the kernel checks, reports where it is broken, and can do without."""
    problem = op_models.random_problem(np.random.default_rng(0), [5], 256, 20, 64, "float32")
    model = op_models.matmul_model(problem["b"], problem["b_scale"], 64, scale_max_multiple=15)
    session = op_models.open_session(model, severity=2)
    assert "node 'the_node': scale_max_multiple is 15 but b_scale is not of that form" in capfd.readouterr().err
    (y,) = session.run(None, {"A": problem["a"], "a_scale": problem["a_scale"]})
    expected = w4a8_matmul.reference(problem["a"], problem["a_scale"], 128, problem["b"], problem["b_scale"], 64)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_quantizers_give_the_reference(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((9, 611)).astype(np.float32)
    expected = dynamic_quantize_per_token.reference(x.astype(op_models.NUMPY_DTYPES[dtype]))
    feed = x if dtype == "bfloat16" else x.astype(op_models.NUMPY_DTYPES[dtype])
    for name in op_models.available_kernels():
        monkeypatch.setenv(op_models.ISA_VARIABLE, name)
        y, scale = op_models.run(op_models.quantize_model(dtype), {"X": feed})
        np.testing.assert_array_equal(y, expected[0], err_msg=name)
        np.testing.assert_array_equal(scale, expected[1], err_msg=name)
