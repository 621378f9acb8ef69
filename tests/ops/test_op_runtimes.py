"""The same library binary and the same model file on other versions of onnxruntime."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import op_models
import pytest
from other_runtimes import python_with

from fptq_onnx.ops import group_query_attention

_ON_ANOTHER_RUNTIME = """
import sys
import numpy as np
import onnxruntime as ort
outputs = {}
for name, levels in [("kernel", ["ORT_ENABLE_ALL"]),
                     ("body", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])]:
    for level in levels:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if name == "kernel":
            options.register_custom_ops_library(sys.argv[2])
        session = ort.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
        feeds = dict(np.load(sys.argv[1] + "/feeds.npz"))
        outputs[f"{name}_{level}"] = session.run(None, feeds)[0]
np.savez(sys.argv[1] + "/outputs.npz", **outputs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [0, 15], ids=["float scales", "integer scales"])
@pytest.mark.parametrize("version", ["1.23.2", "1.27.0", "1.32.0"])
def test_other_runtimes_agree(version: str, multiple: int, tmp_path: Path) -> None:
    """One library: the kernel gives the same bytes everywhere, the function body agrees at every level.

    To 1e-4 with float scales, whose sums have no fixed order; bit for bit with integer-structured ones.
    """
    python = python_with(version)
    rng = np.random.default_rng(2)
    problem = op_models.random_problem(rng, [2, 5], 300, 33, 128, "float32")
    scale = np.float32(2.0**-7) * rng.integers(1, 16, (3, 33)).astype(np.float32) if multiple else problem["b_scale"]
    model = op_models.matmul_model(problem["b"], scale, 128, zero_point=9, scale_max_multiple=multiple)
    feeds = {"A": problem["a"], "a_scale": problem["a_scale"]}
    op_models.ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "feeds.npz", **feeds)
    subprocess.run([python, "-c", _ON_ANOTHER_RUNTIME, str(tmp_path), op_models.library_path()], check=True)
    (expected,) = op_models.run(model, feeds)
    outputs = np.load(tmp_path / "outputs.npz")
    assert len(outputs.files) == 5
    for name in outputs.files:
        tolerance = 0 if name.startswith("kernel") or multiple else 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.23.2", "1.27.0", "1.32.0"])
def test_products_of_float_activations_on_other_runtimes(version: str, tmp_path: Path) -> None:
    """Kernel and function body in integers: the same bytes everywhere, rows of NaN included."""
    rng = np.random.default_rng(4)
    b, scale = rng.integers(-8, 8, (300, 33), dtype=np.int8), np.float32(2.0**-7) * rng.integers(1, 16, (3, 33))
    model = op_models.dynamic_matmul_model(b, scale.astype(np.float32), 128, "float32", scale_max_multiple=15)
    x = rng.standard_normal((2, 5, 300)).astype(np.float32)
    x[0, 3, 7], x[1, 1] = np.nan, 0
    op_models.ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "feeds.npz", X=x)
    python = python_with(version)
    subprocess.run([python, "-c", _ON_ANOTHER_RUNTIME, str(tmp_path), op_models.library_path()], check=True)
    (expected,) = op_models.run(model, {"X": x})
    outputs = np.load(tmp_path / "outputs.npz")
    assert len(outputs.files) == 5 and np.isnan(expected[0, 3]).all()
    for name in outputs.files:
        np.testing.assert_array_equal(outputs[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.23.2", "1.27.0", "1.32.0"])
def test_attention_on_other_runtimes(version: str, tmp_path: Path) -> None:
    """The kernel gives the same bytes everywhere; the function body is the runtime's own operator."""
    rng = np.random.default_rng(3)
    shapes = {"qkv": (2, 1, 128), "past_key": (2, 2, 9, 16), "past_value": (2, 2, 9, 16)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds |= {"seqlens_k": np.array([9, 4], np.int32), "total_sequence_length": np.array(10, np.int32)}
    angle = rng.uniform(0, 6, (12, 8))
    feeds |= {"cos_cache": np.cos(angle).astype(np.float32), "sin_cache": np.sin(angle).astype(np.float32)}
    dtypes = {name: op_models.ir.DataType.from_numpy(array.dtype) for name, array in feeds.items()}
    qkv, *others = inputs = [op_models.value(name, dtypes[name], array.shape) for name, array in feeds.items()]
    node = group_query_attention.group_query_attention(
        [qkv], others[:4], others[4:], num_heads=4, kv_num_heads=2, name="the_node"
    )
    for output, name in zip(node.outputs, ("Y", "present_key", "present_value"), strict=True):
        output.name = name
    model = op_models.model_of([node], inputs, [])
    op_models.ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "feeds.npz", **feeds)
    python = python_with(version)
    subprocess.run([python, "-c", _ON_ANOTHER_RUNTIME, str(tmp_path), op_models.library_path()], check=True)
    expected = op_models.run(model, feeds)[0]
    outputs = np.load(tmp_path / "outputs.npz")
    assert len(outputs.files) == 5
    for name in outputs.files:
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=0 if name.startswith("kernel") else 1e-5)
