"""Exports of tiny checkpoints: names, shapes, types, agreement with torch, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from fptq_onnx.errors import ModelError, RuntimeUnavailableError, VerificationError
from fptq_onnx.export import ExportResult, export_model


def _names(values: list[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _copy(architecture: str, target: Path) -> Path:
    shutil.copytree(families.checkpoint(architecture), target)
    return target


def _edit_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export_model(families.checkpoint("llama"), tmp_path_factory.mktemp("exported"), kv_cache=True)


def test_result_describes_the_files(exported: ExportResult) -> None:
    assert exported.architecture == "LlamaForCausalLM"
    assert (exported.kind, exported.dtype, exported.kv_cache, exported.opset) == ("decoder", "float32", True, 21)
    assert exported.model_bytes == exported.path.stat().st_size
    assert set(exported.files) >= {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert all((exported.path.parent / name).is_file() for name in exported.files)
    assert exported.largest_error is not None and exported.largest_error < 1e-5


def test_cached_decoder_has_the_conventional_interface(exported: ExportResult) -> None:
    model = ir.load(exported.path)
    layers = [f"{layer}.{part}" for layer in range(families.BLOCKS) for part in ("key", "value")]
    assert _names(model.graph.inputs) == [
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{name}" for name in layers),
    ]
    assert _names(model.graph.outputs) == ["logits", *(f"present.{name}" for name in layers)]
    shapes = {value.name: [str(size) for size in value.shape] for value in model.graph.inputs}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    assert shapes["past_key_values.0.key"] == ["batch", "2", "past_sequence", "16"]
    assert model.opset_imports[""] == 21


def test_graph_holds_nothing_of_this_machine(exported: ExportResult) -> None:
    content = exported.path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


def test_prefill_then_decode_equals_one_pass(exported: ExportResult) -> None:
    model = families.model("llama", families.DYNAMO_KV)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    token_ids = model.token_ids(batch=3, length=10)
    whole = session.run(["logits"], model.feeds(token_ids))[0]

    names = [output.name for output in session.get_outputs()]
    _, *present = session.run(names, model.feeds(token_ids[:, :9]))
    feeds = model.feeds(token_ids[:, 9:])
    feeds["attention_mask"] = np.ones((3, 10), np.int64)
    feeds["position_ids"] = np.full((3, 1), 9)
    feeds |= {name.replace("present", "past_key_values"): array for name, array in zip(names[1:], present, strict=True)}
    np.testing.assert_allclose(session.run(["logits"], feeds)[0][:, 0], whole[:, 9], atol=1e-4)


def test_float16_decoder_has_float16_weights_and_cache() -> None:
    model = ir.load(families.model("llama", families.DYNAMO_FP16).path)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert types["past_key_values.0.key"] == types["present.0.value"] == types["logits"] == ir.DataType.FLOAT16
    matrices = [value for value in model.graph.initializers.values() if len(value.shape or ()) == 2]
    assert matrices and all(value.dtype == ir.DataType.FLOAT16 for value in matrices)


def test_decoder_without_cache_and_encoders() -> None:
    decoder = ir.load(families.model("gpt2", families.DYNAMO).path)
    assert _names(decoder.graph.inputs) == ["input_ids", "attention_mask", "position_ids"]
    assert _names(decoder.graph.outputs) == ["logits"]
    encoder = ir.load(families.model("bert", families.DYNAMO).path)
    assert _names(encoder.graph.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert _names(encoder.graph.outputs) == ["logits"]


def test_encoder_without_head(tmp_path: Path) -> None:
    folder = _edit_config(_copy("bert-classifier", tmp_path / "bert"), architectures=["BertModel"])
    result = export_model(folder, tmp_path / "out")
    assert result.kind == "encoder" and not result.kv_cache
    assert _names(ir.load(result.path).graph.outputs) == ["last_hidden_state", "pooler_output"]


def test_disagreement_with_torch_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fptq_onnx.export import tracing

    trace = tracing.trace

    def trace_wrongly(*arguments: object) -> ir.Model:
        model = trace(*arguments)
        name, value = next((n, v) for n, v in model.graph.initializers.items() if n.endswith("norm.weight"))
        value.const_value = ir.tensor(value.const_value.numpy() * 1.1, name=name)
        return model

    monkeypatch.setattr(tracing, "trace", trace_wrongly)
    for before in ({}, {"model.onnx": b"an earlier export", "tokenizer.json": b"its tokenizer"}):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(VerificationError, match=r"model\.onnx: the exported graph differs from torch by"):
            export_model(families.checkpoint("llama"), tmp_path, kv_cache=False)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_of_the_checkpoint_are_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting into the checkpoint's folder is fine as long as its own files stay what they are."""
    folder = _copy("llama", tmp_path / "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("fptq_onnx.export.tracing.trace", None)  # refused before the work

        def anew(source: object, target: Path) -> list[str]:
            (target / "config.json").write_text("{}")
            return ["config.json"]

        patched.setattr("fptq_onnx.export.pretrained.save_tokenizer", anew)
        with pytest.raises(ModelError, match=r"config\.json: this is a file of the checkpoint\. Choose another"):
            export_model(folder, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_model(folder, folder, verify=False)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"model\.onnx: cannot be written: (File exists|Not a directory)"):
        export_model(families.checkpoint("llama"), tmp_path / "file")


def test_missing_directory_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        export_model(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ModelError, match=r"neither config\.json nor a GGUF file"):
        export_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        export_model(tmp_path, tmp_path / "out")


def test_damaged_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"model\.gguf: it cannot be loaded"):
        export_model(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MadeUpForCausalLM"]}, "has no MadeUpForCausalLM"),
        ({"architectures": None}, 'names no "architectures"'),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized with gptq"),
    ],
)
def test_unsupported_config(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = _edit_config(_copy("llama", tmp_path / "llama"), **changes)
    with pytest.raises(ModelError, match=message):
        export_model(folder, tmp_path / "out")


def test_invalid_config_json(tmp_path: Path) -> None:
    folder = _copy("llama", tmp_path / "llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        export_model(folder, tmp_path / "out")


def test_missing_and_truncated_weights(tmp_path: Path) -> None:
    folder = _copy("llama", tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        export_model(folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        export_model(folder, tmp_path / "out")


def test_parameters_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    folder = _edit_config(_copy("bert", tmp_path / "bert"), architectures=["BertModel"])
    with pytest.raises(ModelError, match=r"lack 2 parameters of BertModel, for example pooler\.dense"):
        export_model(folder, tmp_path / "out")


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        export_model(tmp_path / "t5", tmp_path / "out")


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Use one of float32, float16"):
        export_model(tmp_path, tmp_path, dtype="int8")
    with pytest.raises(ModelError, match="Use 21 to 23"):
        export_model(tmp_path, tmp_path, opset=17)


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else sys)
    with pytest.raises(RuntimeUnavailableError, match=r"fptq-onnx\[export\]"):
        export_model(tmp_path, tmp_path / "out")
