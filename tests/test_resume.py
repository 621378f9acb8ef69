"""Conversions that are stopped, killed and taken up again give the bytes of one that was left alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
import pytest
from conversions import LENGTH, converted, recipe

import fptq_onnx
from fptq_onnx.errors import ModelError, StoppedError, WorkDirError
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report

# `FPTQ_KILLS=20 pytest tests/test_resume.py -k kill` for as many moments as there is time.
KILLS = int(os.environ.get("FPTQ_KILLS", "3"))
# GPTQ, equalization and histograms of the equalized activations: every kind of record.
OVERRIDES = {
    "calibration.windows": 6,
    "calibration.length": LENGTH,
    "weights.group_size": 32,
    "weights.rounding": "gptq",
    "activations.static_range": "mse",
}
OPTIONS = ("--recipe", "paper", "--verify-tokens", "0", *(f"--set={key}={value}" for key, value in OVERRIDES.items()))
_MAIN = "import sys; from fptq_onnx.cli import main; sys.argv[0] = 'fptq-onnx'; main()"


def _recipe() -> Recipe:
    return Recipe.load("paper", OVERRIDES)


def _model() -> Path:
    return families.model("llama", families.GENAI_FP16).path


def _convert(folder: Path, **arguments: Any) -> Report:
    arguments = {"recipe": _recipe(), "verify_tokens": 0} | arguments
    return fptq_onnx.convert(_model(), folder / "out.onnx", **arguments)


def _start(folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    package = Path(fptq_onnx.__file__).parent.parent
    command = [sys.executable, "-c", _MAIN, "convert", str(_model()), "-o", str(folder / "out.onnx"), *OPTIONS]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(package)} | environment,
    )


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "out.json"  # times
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of what a conversion in one go, all in memory, writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _convert(folder)
    return _digests(folder)


def test_stopping_after_every_block(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    stops = []
    while True:
        try:
            report = _convert(tmp_path, work_dir=tmp_path / "work", stop=lambda: True)
            break
        except StoppedError as error:
            stops.append(error.where.removeprefix("stopped after "))
            assert set(_digests_of_files(tmp_path)) == set()
    blocks = [f"block {index}" for index in range(families.BLOCKS)]
    assert stops == [
        *(f"{stage}, {name}" for stage in ("calibrating", "quantizing") for name in ["embedding", *blocks])
    ]
    assert _digests(tmp_path) == undisturbed
    assert {layer.weight_method for layer in report.layers[:-1]} <= {"absmax7 g32, gptq", "absmax7 g32, round"}


def _digests_of_files(folder: Path) -> dict[str, str]:
    return {path.name: "" for path in folder.iterdir() if path.is_file()}


def test_default_recipe_stopped_once_in_each_stage(tmp_path: Path) -> None:
    """Rotations, samples of activations, an int8 head: all of it is found again."""
    settings = Recipe.load("balanced", {key: value for key, value in OVERRIDES.items() if "static" not in key})
    for name, moments in (("a", ()), ("b", (3, 8))):
        (tmp_path / name).mkdir()
        asked = 0

        def stop(moments: tuple[int, ...] = moments) -> bool:
            nonlocal asked
            asked += 1
            return asked in moments

        stops = 0
        for _ in range(len(moments) + 1):
            try:
                _convert(tmp_path / name, recipe=settings, work_dir=tmp_path / name / "work", stop=stop)
            except StoppedError:
                stops += 1
        assert stops == len(moments)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


def test_a_stop_in_a_fall_back_round_does_not_repeat_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    usual = converted("llama", families.DYNAMO).report.verification
    assert usual is not None and usual.kl_mean is not None
    options = {"recipe": recipe(fallback__rounds=4), "verify_tokens": 2 * LENGTH, "max_kl": usual.kl_mean / 3}
    rounds = {}

    def run(name: str, **more: Any) -> None:
        (tmp_path / name.split()[0]).mkdir(exist_ok=True)
        caplog.clear()
        try:
            _convert(tmp_path / name.split()[0], work_dir=tmp_path / name.split()[0] / "work", **options, **more)
        finally:
            rounds[name] = sum("converting again" in record.message for record in caplog.records)

    run("undisturbed")
    second = tmp_path / "stopped" / "work.fall-back-4"
    with pytest.raises(StoppedError):
        run("stopped", stop=second.exists)
    assert [path.name for path in second.with_name("work").glob("*.safetensors")] == ["fall-back.safetensors"]
    run("stopped again")
    assert rounds["stopped"] == 1
    assert rounds["stopped again"] == rounds["undisturbed"] - 1
    assert _digests(tmp_path / "stopped") == _digests(tmp_path / "undisturbed")


def test_killed_at_any_moment(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    rng, span = random.Random(7), 3.0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = _start(folder, "--work-dir", str(folder / "work"))
        assert process.stderr is not None
        assert process.stderr.readline().startswith("no --calibration")
        assert process.stderr.readline().startswith("estimate: ")
        begun = time.monotonic()
        time.sleep(rng.random() * span)
        process.kill()
        if process.wait() == 0:
            span = min(span, time.monotonic() - begun)  # it was done before
        process.stderr.close()
        _convert(folder, work_dir=folder / "work")
        assert _digests(folder) == undisturbed, f"moment {number}"


def test_interrupt_ends_with_75_and_the_same_command_goes_on(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = _start(tmp_path, "--work-dir", str(tmp_path / "work"))
    assert process.stderr is not None
    assert any(line.startswith("estimate: ") for line in process.stderr), "it ended before it began to calibrate"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert "stopping when this block is done" in said and "Run the same command again to go on." in said
    assert "Traceback" not in said and not (tmp_path / "out.onnx").exists()
    again = _start(tmp_path, "--work-dir", str(tmp_path / "work"))
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert _digests(tmp_path) == undisturbed


def test_work_of_another_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        _convert(tmp_path, work_dir=tmp_path / "work", stop=lambda: True)
    before = sorted(path.name for path in (tmp_path / "work").iterdir())
    for differing, what in (
        ({"recipe": _recipe().with_overrides({"calibration.seed": 3})}, "the calibration data, the recipe"),
        ({"output_format": "qdq"}, "the format"),
    ):
        with pytest.raises(WorkDirError, match=f"belongs to another conversion: {what} changed"):
            _convert(tmp_path, work_dir=tmp_path / "work", **differing)
    with pytest.raises(WorkDirError, match="holds files of something else"):
        _convert(tmp_path, work_dir=_model().parent)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == before


def test_threads_and_memory_change_no_byte(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    small = {"max_memory": 1 << 12}  # everything to disk, one activation's second moments at a time
    for number, options in enumerate(({"threads": 1}, {"threads": 4}, small)):
        folder = tmp_path / str(number)
        folder.mkdir()
        _convert(folder, **options)
        assert _digests(folder) == undisturbed, options


def test_one_blas_thread_changes_no_byte(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = _start(tmp_path, "--threads", "1", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert _digests(tmp_path) == undisturbed


def test_verification_block_by_block_says_the_same(tmp_path: Path) -> None:
    """With the float32 model every figure is the same; the models share one cut."""
    model = families.model("llama", families.DYNAMO).path
    reports = []
    for name, options in (("a", {}), ("b", {"max_memory": 1 << 12})):
        arguments = {"recipe": _recipe(), "verify_tokens": 2 * LENGTH} | options
        reports.append(fptq_onnx.convert(model, tmp_path / f"{name}.onnx", **arguments))
    whole, cut = (json.loads(report.to_json()) for report in reports)
    assert cut["verification"]["tokens"] == whole["verification"]["tokens"] == 2 * LENGTH
    for key in ("kl_mean", "top1_agreement", "output_snr_db"):
        assert cut["verification"][key] == pytest.approx(whole["verification"][key], rel=1e-3)
    for ours, theirs in zip(cut["layers"], whole["layers"], strict=True):
        assert ours["snr_db"] == pytest.approx(theirs["snr_db"], abs=0.05), ours["label"]


def test_full_disk_leaves_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while saving costs the saving only."""

    def full(*arguments: object) -> None:
        raise ModelError("out.onnx", "cannot be written: No space left on device", "check the free space")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["fptq_onnx.convert"], "save_model", full)
        with pytest.raises(ModelError, match="No space left"):
            _convert(tmp_path, work_dir=tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert len(list((tmp_path / "work").glob("weights.*"))) == families.BLOCKS + 1  # the head stays float
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["fptq_onnx.quantizing"], "_weight", full)  # nothing is quantized again
        _convert(tmp_path, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
