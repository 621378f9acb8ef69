"""Sessions: with and without the library, and no silent fallback from CUDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from fptq_onnx import ops, runtime
from fptq_onnx.errors import ModelError, RuntimeUnavailableError


def _model() -> ir.Model:
    x = ir.Value(name="X", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 8]))
    node = ops.dynamic_quantize_per_token.dynamic_quantize_per_token(x, name="q")
    node.outputs[0].name, node.outputs[1].name = "Y", "scale"
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], opset_imports={"": ops.BODY_OPSET, ops.DOMAIN: ops.VERSION}, name="quantizer"
    )
    return ir.Model(graph, ir_version=10, functions=[ops.dynamic_quantize_per_token.function()])


@pytest.mark.parametrize("register_library", [True, False])
def test_file_and_memory(tmp_path: Path, register_library: bool) -> None:
    path = tmp_path / "model.onnx"
    ir.save(_model(), path)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    expected = ops.dynamic_quantize_per_token.reference(x)
    for model in (path, str(path), _model()):
        opened = runtime.session(model, register_library=register_library, threads=1)
        y, scale = opened.run(None, {"X": x})
        np.testing.assert_array_equal(y, expected[0])
        np.testing.assert_array_equal(scale, expected[1])
        assert opened.get_session_options().intra_op_num_threads == 1


def test_the_library_decides_which_kernel_runs(tmp_path: Path) -> None:
    """With the library the node stays, without it the function body is inlined."""
    kinds = {}
    for register_library in (True, False):
        opened = runtime.session(_model(), register_library=register_library, threads=1)
        options = ort.SessionOptions()
        del opened
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile-{register_library}")
        if register_library:
            options.register_custom_ops_library(str(ops.get_library_path()))
        data = ir.serde.serialize_model(_model()).SerializeToString()
        profiled = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        profiled.run(None, {"X": np.ones((1, 8), np.float32)})
        kinds[register_library] = Path(profiled.end_profiling()).read_text(encoding="utf-8")
    assert '"op_name" : "DynamicQuantizePerToken"' in kinds[True]
    assert '"op_name" : "DynamicQuantizePerToken"' not in kinds[False]
    assert '"op_name" : "Round"' in kinds[False]


def test_configuration_reaches_the_session() -> None:
    opened = runtime.session(_model(), config={"session.intra_op.allow_spinning": "0"})
    assert opened.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_model_in_memory_is_left_alone() -> None:
    model = _model()
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    runtime.session(model)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere.onnx: there is no such file. Check the path"):
        runtime.session(tmp_path / "nowhere.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"broken.onnx: onnxruntime .* cannot open it"):
        runtime.session(broken)


def test_unknown_provider() -> None:
    with pytest.raises(RuntimeUnavailableError, match="Use 'cpu' or 'cuda'"):
        runtime.session(_model(), "tpu")  # type: ignore[arg-type]


def test_cuda_without_the_provider_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match=r"has no CUDA execution provider. Install onnxruntime-gpu"):
        runtime.session(_model(), "cuda")


def test_cuda_without_cuda_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(runtime, "library_info", lambda: ops.LibraryInfo(version="0.1.0", cuda=None))
    with pytest.raises(RuntimeUnavailableError, match=r"was built without CUDA kernels. Build it where nvcc"):
        runtime.session(_model(), "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime itself only warns and runs on the CPU."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(runtime, "library_info", lambda: ops.LibraryInfo(version="0.1.0", cuda="13.0"))
    with pytest.raises(RuntimeUnavailableError, match="could not start CUDAExecutionProvider and fell back to CPU"):
        runtime.session(_model(), "cuda")
