"""Model repositories for Triton: what is in them, that Triton's own schema takes them, and that failures leave none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import families
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import Result
from conversions import converted
from typer.testing import CliRunner

import fptq_onnx
from fptq_onnx.cli import app
from fptq_onnx.errors import ModelError, RuntimeUnavailableError
from fptq_onnx.ops import library_info
from fptq_onnx.packaging.triton import package_triton
from fptq_onnx.packaging.triton_config import TritonOptions, TritonTensor, check_schema, render_config

CLIENT = "tritonclient[grpc]==2.73.0"
# Prints a config.pbtxt, parsed by Triton's schema, as JSON.
PARSE = (
    "import sys; from google.protobuf import json_format, text_format\n"
    "from tritonclient.grpc import model_config_pb2 as schema\n"
    "config = text_format.Parse(open(sys.argv[1]).read(), schema.ModelConfig())\n"
    "print(json_format.MessageToJson(config, preserving_proto_field_name=True))"
)


@pytest.fixture(scope="session")
def client_python() -> Path:
    """An interpreter with Triton's schema. It pins an older protobuf, so it gets an environment of its own."""
    folder = Path(__file__).parents[2] / ".cache" / "tritonclient-2.73.0"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", CLIENT], check=True, stderr=subprocess.DEVNULL)
        # After its own packages those of this environment, so that the command line runs there too.
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "zz-shared.pth").write_text("\n".join(path for path in sys.path if path))
        (folder / "complete").touch()
    return python


def _parse(python: Path, config: Path) -> dict:
    done = subprocess.run([python, "-c", PARSE, config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)


def test_decoder_with_cache(tmp_path: Path, client_python: Path) -> None:
    """The whole path: a quantized model, its library, a config that Triton's schema reads back as meant."""
    model = converted("llama", families.DYNAMO_KV)
    repository = tmp_path / "models"
    options = TritonOptions(instances=2, max_batch_size=4, queue_delay_us=50, threads=1)
    written = package_triton(model.path, repository, name="tiny", options=options)
    assert written.files == ("tiny/1/model.onnx", "tiny/config.pbtxt", "tiny/libfptq_ops.so")
    assert written.batched and "tritonserver --model-repository=/models" in written.server_command

    config = _parse(client_python, repository / "tiny" / "config.pbtxt")
    tensors = {tensor["name"]: tensor for tensor in config["input"] + config["output"]}
    session = fptq_onnx.session(repository / "tiny" / "1" / "model.onnx", threads=1)
    assert set(tensors) == {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    assert tensors["input_ids"] == {"name": "input_ids", "data_type": "TYPE_INT64", "dims": ["-1"]}
    cache = [str(families.KV_HEADS), "-1", str(families.HEAD_SIZE)]
    assert tensors["past_key_values.0.key"]["dims"] == cache == tensors["present.2.value"]["dims"]
    assert tensors["logits"]["data_type"] == "TYPE_FP32" and tensors["logits"]["dims"] == [
        "-1",
        str(families.VOCABULARY),
    ]
    assert config["backend"] == "onnxruntime" and config["default_model_filename"] == "model.onnx"
    assert config["max_batch_size"] == 4
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": "50"}
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
    assert config["parameters"] == {"intra_op_thread_count": {"string_value": "1"}}
    assert config["model_operations"] == {"op_library_filename": ["/models/tiny/libfptq_ops.so"]}

    # The copies work together as the server would load them.
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(repository / "tiny" / "libfptq_ops.so"))
    opened = onnxruntime.InferenceSession(
        repository / "tiny" / "1" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    token_ids = model.tiny.token_ids()
    logits = opened.run(["logits"], model.tiny.feeds(token_ids))[0]
    np.testing.assert_array_equal(logits, model.run(token_ids))


def test_float_model_with_external_data(tmp_path: Path, client_python: Path) -> None:
    """Data files come along, under the names the model has for them; no library where nothing needs it."""
    tiny = families.model("llama", families.GENAI_FP16)
    assert tiny.path.with_name("model.onnx.data").is_file()
    written = package_triton(tiny.path.parent, tmp_path)
    assert written.name == tiny.path.parent.name
    assert written.files == tuple(
        f"{written.name}/{file}" for file in ("1/model.onnx", "1/model.onnx.data", "config.pbtxt")
    )
    config = _parse(client_python, tmp_path / written.name / "config.pbtxt")
    assert "model_operations" not in config
    assert {tensor["data_type"] for tensor in config["output"]} == {"TYPE_FP16"}
    token_ids = tiny.token_ids()
    copy = tmp_path / written.name / "1" / "model.onnx"
    np.testing.assert_array_equal(tiny.run(token_ids, copy), tiny.run(token_ids))


def test_model_in_a_cache_of_links(tmp_path: Path) -> None:
    """The files of a Hugging Face snapshot are links to blobs; the copies have the names that the model gives."""
    tiny = families.model("llama", families.GENAI_FP32)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, blob in (("model.onnx", "1f0a"), ("model.onnx.data", "77c2")):
        (tmp_path / "blobs" / blob).write_bytes(tiny.path.with_name(name).read_bytes())
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{blob}")
    written = package_triton(tmp_path / "snapshot" / "model.onnx", tmp_path / "models")
    assert written.files == ("snapshot/1/model.onnx", "snapshot/1/model.onnx.data", "snapshot/config.pbtxt")
    copy, token_ids = tmp_path / "models" / "snapshot" / "1" / "model.onnx", tiny.token_ids()
    assert not copy.with_name("model.onnx.data").is_symlink()
    np.testing.assert_array_equal(tiny.run(token_ids, copy), tiny.run(token_ids))


def test_the_command_checks_the_schema_where_it_can(tmp_path: Path, client_python: Path) -> None:
    model = families.model("bert", families.DYNAMO)
    script = "import sys; from fptq_onnx.cli import main; sys.argv[0] = 'fptq-onnx'; main()"
    command = [client_python, "-c", script, "package", model.path, "--triton", tmp_path, "--name", "bert", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema_checked"] is True and "not checked" not in done.stderr
    assert report["files"] == ["bert/1/model.onnx", "bert/config.pbtxt"]
    check = "import sys; from fptq_onnx.packaging.triton_config import check_schema; check_schema(sys.argv[1], 'x')"
    bad = subprocess.run([client_python, "-c", check, "max_batch: 8"], capture_output=True, text=True, check=False)
    assert "does not fit Triton's schema" in bad.stderr and 'no field named "max_batch"' in bad.stderr


def test_command_says_what_it_wrote(tmp_path: Path) -> None:
    model = converted("llama", families.DYNAMO)
    result = _run("package", model.path, "--triton", tmp_path / "my models", "--name", "w4a8", "--max-batch-size", 0)
    assert result.exit_code == 0, result.stderr
    assert ("pip install 'fptq-onnx[triton]'" in result.stderr) == (not check_schema("", "nothing"))
    assert "w4a8/libfptq_ops.so" in result.stdout
    assert f"-v '{tmp_path}/my models:/models:ro' nvcr.io/nvidia/tritonserver" in result.stdout
    assert "dynamic_batching" not in (tmp_path / "my models" / "w4a8" / "config.pbtxt").read_text()


def _fixed_batch(path: Path) -> Path:
    model = ir.load(families.model("bert-classifier", families.DYNAMO).path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name != "attention_mask":
            value.shape = ir.Shape([1, *list(value.shape or ())[1:]])
    ir.save(model, path)
    return path


def test_fixed_batch_is_not_batched(tmp_path: Path) -> None:
    model = _fixed_batch(tmp_path / "fixed.onnx")
    written = package_triton(model, tmp_path / "models")
    assert written.name == "fixed" and not written.batched
    assert written.unbatched_reason == "the first dimension of input_ids is fixed"
    config = (tmp_path / "models" / "fixed" / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in config and "dims: [ 1, -1 ]" in config and "dynamic_batching" not in config
    result = _run("package", model, "--triton", tmp_path / "again", "--json")
    assert "no batching: the first dimension of input_ids is fixed" in result.stderr
    assert json.loads(result.stdout)["unbatched_reason"] is not None


def test_awkward_names_and_scalars_fit_the_schema(tmp_path: Path, client_python: Path) -> None:
    tensors = [TritonTensor('a "b" \\ \n é', "TYPE_BF16", ()), TritonTensor("c", "TYPE_STRING", (2, -1))]
    text = render_config("m", tensors, tensors, TritonOptions(provider="cuda", max_batch_size=0), "/a b/lib.so")
    (tmp_path / "config.pbtxt").write_text(text)
    config = _parse(client_python, tmp_path / "config.pbtxt")
    assert [tensor["name"] for tensor in config["input"]] == ['a "b" \\ \n é', "c"]
    assert config["input"][0]["dims"] == ["1"] and config["input"][0]["reshape"] == {}
    assert config["instance_group"][0]["kind"] == "KIND_GPU"


def test_errors_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("llama", families.DYNAMO).path
    repository = tmp_path / "models"
    package_triton(model, repository, name="taken")
    with pytest.raises(ModelError, match=r"taken: is there already\. Remove it, or give another --name"):
        package_triton(model, repository, name="taken")
    with pytest.raises(ModelError, match="name 'a/b': holds characters"):
        package_triton(model, repository, name="a/b")
    with pytest.raises(ModelError, match="path 'models': is not absolute"):
        package_triton(model, repository, name="x", served_from="models")
    if library_info().cuda is None:
        with pytest.raises(RuntimeUnavailableError, match="built without CUDA kernels"):
            package_triton(model, repository, name="x", options=TritonOptions(provider="cuda"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file/x: cannot be written: File exists"):
        package_triton(model, tmp_path / "file", name="x")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fptq_onnx.packaging.triton.shutil.copyfile", full)
    with pytest.raises(ModelError, match="x: cannot be written: No space left"):
        package_triton(model, repository, name="x")
    assert [path.name for path in repository.iterdir()] == ["taken"]


def test_types_triton_does_not_know(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.COMPLEX64, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [x])
    graph.output[0].name = "y"
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m\.onnx, x: has type COMPLEX64, which Triton does not know"):
        package_triton(tmp_path / "m.onnx", tmp_path / "models")
    assert not (tmp_path / "models").exists()
