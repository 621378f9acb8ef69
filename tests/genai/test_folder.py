"""Converted model folders: complete, loaded by onnxruntime-genai as they are, and whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx_ir as ir
import pytest
from conversions import LENGTH, recipe
from genai_runs import generate_with_genai
from typer.testing import CliRunner

import fptq_onnx
from fptq_onnx.cli import app
from fptq_onnx.errors import FptqError, ModelError, NothingQuantizedError, VerificationError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.generate import generate, stop_tokens

# And whether steps are fused, float32 attention among them.
FAMILIES = ((families.GENAI_FP32, False), (families.GENAI_FP32, True), (families.GENAI_FP16, False))
PROMPTS = ([5, 6, 7, 8], [31, 14, 15, 92, 65, 35], [200])
NEW = 12


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of the model builder, and what `convert` makes of it."""
    family, fuse = request.param
    source = families.model("llama", family).path.parent
    target = tmp_path_factory.mktemp("genai") / "converted"
    before = _digests(source)
    report = fptq_onnx.convert(source, target, recipe=recipe(), fuse=fuse, verify_tokens=LENGTH)
    assert _digests(source) == before
    assert report.output == str(target / "model.onnx") and report.verification is not None
    return source, target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the tiny folder, to be spoilt."""
    return Path(shutil.copytree(families.model("llama", families.GENAI_FP32).path.parent, tmp_path / "source"))


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "genai_config.json").read_text())


def _edit(folder: Path, change: dict[str, Any]) -> None:
    config = _config(folder)
    config["model"]["decoder"] |= change
    (folder / "genai_config.json").write_text(json.dumps(config))


def test_folder_is_complete_and_only_names_the_library_more(folders: tuple[Path, Path]) -> None:
    source, target = folders
    before, after = _digests(source), _digests(target)
    assert set(after) == set(before) | {"model.json", "libfptq_ops.so"}
    assert {name for name in before if before[name] != after[name]} == {
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
    }
    expected = _config(source)
    expected["model"]["decoder"]["session_options"]["custom_ops_library"] = "libfptq_ops.so"
    assert _config(target) == expected
    assert (target / "libfptq_ops.so").read_bytes() == fptq_onnx.get_library_path().read_bytes()
    assert json.loads((target / "model.json").read_text())["output"] == str(target / "model.onnx")
    assert [path.name for path in target.parent.iterdir()] == ["converted"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_genai_generates_the_tokens_of_the_plain_loop(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """From another place, and with the kernels: without the library the folder does not load."""
    _, target = folders
    moved = Path(shutil.copytree(target, tmp_path / "moved"))
    model = open_language_model(target / "model.onnx")
    stop = stop_tokens(target)
    plain = [generate(model, [prompt], max_new_tokens=NEW, stop=stop).token_ids[0] for prompt in PROMPTS]
    # onnxruntime-genai leaves the stop token out of its sequence.
    assert generate_with_genai(moved, PROMPTS, NEW) == [[id for id in row if id not in stop] for row in plain]
    (moved / "libfptq_ops.so").unlink()
    with pytest.raises(RuntimeError, match="libfptq_ops"):
        generate_with_genai(moved, PROMPTS, NEW)


def test_other_models_and_subfolders_are_copied(source: Path) -> None:
    """Data that only the float decoder reads is left behind, data of another model is not."""
    table = ir.tensor(np.arange(64, dtype=np.float32).reshape(8, 8), name="table")
    value = ir.Value(name="table", const_value=table, shape=table.shape, type=ir.TensorType(table.dtype))
    node = ir.node("Identity", [value])
    node.outputs[0].name = "pixels"
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 21}, name="vision")
    extra = ir.Model(graph, ir_version=10)
    (source / "vision").mkdir()
    ir.save(extra, source / "vision" / "vision.onnx", external_data="vision.data", size_threshold_bytes=0)
    (source / "notes").mkdir()
    (source / "notes" / "README.md").write_text("kept")
    target = source.parent / "target"
    fptq_onnx.convert(source, target, recipe=recipe(), verify_tokens=0)
    for name in ("vision/vision.onnx", "vision/vision.data", "notes/README.md", "tokenizer.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_standard_operators_need_no_library(source: Path) -> None:
    target = source.parent / "target"
    fptq_onnx.convert(source, target, recipe=recipe(), verify_tokens=0, output_format="matmulnbits")
    assert _config(target) == _config(source)
    assert not (target / "libfptq_ops.so").exists()
    assert len(generate_with_genai(target, [[1, 2]], 4)[0]) == 4


def test_a_missed_bound_leaves_the_folder_as_it_leaves_a_file(source: Path) -> None:
    target = source.parent / "target"
    with pytest.raises(VerificationError, match=r"target: mean KL .* is over the allowed 1e-09"):
        fptq_onnx.convert(source, target, recipe=recipe(), verify_tokens=LENGTH, max_kl=1e-9)
    assert generate_with_genai(target, [[1, 2]], 2)


def test_a_failed_conversion_leaves_nothing(source: Path) -> None:
    with pytest.raises(NothingQuantizedError):
        fptq_onnx.convert(source, source.parent / "target", recipe=recipe(), exclude=["."])
    assert list(source.parent.iterdir()) == [source]


def test_plan_only(source: Path) -> None:
    fptq_onnx.convert(source, source.parent / "out.v1", recipe=recipe(), dry_run=True)
    assert {path.name for path in source.parent.iterdir()} == {"source", "out.v1.plan.json"}


def test_command_with_the_default_output(source: Path) -> None:
    arguments = ["--recipe", "paper", "--set", "calibration.windows=1", "--verify-tokens", "0", "--json"]
    result = CliRunner().invoke(app, ["convert", str(source), *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["output"] == str(source.parent / "source.fptq" / "model.onnx")
    assert (source.parent / "source.fptq" / "genai_config.json").is_file()


def _no_config(source: Path) -> None:
    (source / "genai_config.json").unlink()


def _broken_config(source: Path) -> None:
    (source / "genai_config.json").write_text("{")


def _no_decoder(source: Path) -> None:
    (source / "genai_config.json").write_text('{"model": []}')


def _pipeline(source: Path) -> None:
    _edit(source, {"filename": "", "pipeline": [{}]})


def _missing_model(source: Path) -> None:
    _edit(source, {"filename": "other.onnx"})


def _outside(source: Path) -> None:
    (source / "model.onnx").rename(source.parent / "model.onnx")
    _edit(source, {"filename": "../model.onnx"})


def _odd_options(source: Path) -> None:
    _edit(source, {"session_options": [1]})


def _other_library(source: Path) -> None:
    _edit(source, {"session_options": {"custom_ops_library": "libother.so"}})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_no_config, "holds no genai_config.json"),
        (_broken_config, "is not JSON"),
        (_no_decoder, r"has no section model\.decoder"),
        (_pipeline, "pipeline of several models"),
        (_missing_model, r"names other\.onnx, which is not there"),
        (_outside, r"names the decoder \.\./model\.onnx, outside the folder"),
        (_odd_options, "session_options of its decoder is no object"),
        (_other_library, r"already loads libother\.so"),
    ],
)
def test_folders_that_cannot_be_converted(source: Path, spoil: Any, reason: str) -> None:
    spoil(source)
    with pytest.raises(ModelError, match=reason):
        fptq_onnx.convert(source, source.parent / "target")
    assert {path.name for path in source.parent.iterdir()} <= {source.name, "model.onnx"}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("source", "lies in the folder that is converted"),
        ("source/inner", "lies in the folder that is converted"),
        ("full", "not an empty folder"),
        ("full/file", "not an empty folder"),
        ("missing/target", "No such file or directory"),
    ],
)
def test_outputs_that_cannot_be_written(source: Path, target: str, reason: str) -> None:
    (source.parent / "full").mkdir()
    (source.parent / "full" / "file").write_text("mine")
    before = _digests(source.parent)
    with pytest.raises(FptqError, match=reason):
        fptq_onnx.convert(source, source.parent / target)
    assert _digests(source.parent) == before


def test_an_empty_folder_is_filled(source: Path) -> None:
    target = source.parent / "target"
    target.mkdir()
    _edit(source, {"session_options": None})
    fptq_onnx.convert(source, target, recipe=recipe(), verify_tokens=0)
    assert (target / "model.onnx").is_file()
