"""The CPU kernels of every instruction set, chosen through FPTQ_CPU_ISA, and the memory that a session holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import op_models
import pytest

from fptq_onnx import ops
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


_RESIDENT = """
import sys
import onnxruntime as ort

def resident():
    fields = {}
    for line in open("/proc/self/smaps_rollup"):
        name, *rest = line.split()
        fields[name] = rest[0]
    return int(fields["Rss:"]) * 1024

options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[2])
ort.InferenceSession(sys.argv[1], options)  # pages of the libraries themselves
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[2])
before = resident()
session = ort.InferenceSession(sys.argv[3], options)
print(resident() - before)
"""


def _save_layers(path: Path, count: int, size: int) -> Path:
    """`count` products of one activation with different weights [size, size], group 128, in an external file."""
    rng = np.random.default_rng(0)
    a = op_models.value("A", ir.DataType.UINT8, ["M", size])
    a_scale = op_models.value("a_scale", ir.DataType.FLOAT, [])
    constants = [op_models.constant("zero_point", np.array(128, np.uint8))]
    nodes = []
    for i in range(count):
        weight = rng.integers(-8, 8, (size, size), np.int8).astype(ml_dtypes.int4)
        operands = [
            op_models.constant(f"B{i}", weight, ir.DataType.INT4),
            op_models.constant(f"s{i}", np.ones((size // 128, size), np.float32)),
        ]
        node = w4a8_matmul.w4a8_matmul(a, a_scale, constants[0], *operands, block_size=128, name=f"n{i}")
        node.outputs[0].name = f"Y{i}"
        nodes.append(node)
        constants += operands
    graph = ir.Graph(
        [a, a_scale],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=constants,
        opset_imports={"": ops.BODY_OPSET, ops.DOMAIN: ops.VERSION},
        name="layers",
    )
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_session_holds_the_packed_copy_only(tmp_path: Path) -> None:
    """Resident memory grows by at most 1.15 times the int4 bytes, external data in a memory-mapped file."""
    layers, size = 6, 4096
    small = _save_layers(tmp_path / "one.onnx", 1, 256)
    large = _save_layers(tmp_path / "many.onnx", layers, size)
    arguments = [sys.executable, "-c", _RESIDENT, str(small), op_models.library_path(), str(large)]
    grown = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert layers * size * size / 2 <= grown <= 1.15 * layers * size * size / 2
