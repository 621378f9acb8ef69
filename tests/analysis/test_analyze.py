"""One analysis from end to end: its files, its steps alone, its budget, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import planted
import pytest
from planted import Analyzed
from typer.testing import CliRunner

import fptq_onnx
from fptq_onnx.analysis.analyze import analyze
from fptq_onnx.cli import app
from fptq_onnx.errors import CalibrationError, ModelError, RecipeError
from fptq_onnx.recipe import Recipe


def test_the_json_has_the_documented_keys(outlier: Analyzed) -> None:
    found = json.loads((outlier.report / "analysis.json").read_text())
    assert {"baseline", "quantized", "groups", "sensitivity", "thresholds", "findings"} <= found.keys()
    losses = [layer["metric_loss"] for layer in found["sensitivity"]]
    assert losses == sorted(losses, reverse=True) and len(losses) == 12
    assert {"name", "role", "block", "metric_loss", "snr_db"} <= found["sensitivity"][0].keys()
    assert {"id", "layers", "evidence", "action"} <= found["findings"][0].keys()
    assert found["quantized"]["loss"] > 0 and found["baseline"]["loss"] == 0
    kinds = {group["kind"] for group in found["groups"]}
    assert kinds == {"part", "role", "block"}
    assert any(point["on_front"] for point in found["thresholds"])
    assert all(layer["kernel"] == "W4A8MatMul on CPUExecutionProvider" for layer in found["sensitivity"])


def test_the_proposed_recipe_converts_and_is_better(outlier: Analyzed, tmp_path: Path) -> None:
    """Judged by `convert`'s own verification, on the data it was calibrated with."""
    proposed = Recipe.load(outlier.report / "recipe.yaml")
    kl = {}
    for name, recipe in (("paper", planted.recipe()), ("proposed", proposed)):
        report = fptq_onnx.convert(
            outlier.model, tmp_path / f"{name}.onnx", calibration=planted.text(outlier.folder), recipe=recipe,
            verify_tokens=64,
        )  # fmt: skip
        assert report.verification is not None and report.verification.kl_mean is not None
        kl[name] = report.verification.kl_mean
    assert kl["proposed"] < 0.5 * kl["paper"]
    proposal = outlier.analysis.proposal
    assert outlier.analysis.quantized is not None
    assert proposal["loss"] < outlier.analysis.quantized.loss
    assert proposal["unseen"]["proposal"]["kl"] < proposal["unseen"]["recipe"]["kl"]


def test_a_second_call_measures_nothing(outlier: Analyzed, tmp_path: Path) -> None:
    again = analyze(
        outlier.model, tmp_path, text=planted.text(outlier.folder), calibration=planted.text(outlier.folder),
        recipe=planted.recipe(), tokens=64, window=32, work_dir=outlier.work_dir, steps=("groups", "layers"),
    )  # fmt: skip
    assert again.measurements == 0
    assert [layer.metric_loss for layer in again.sensitivity] == [
        layer.metric_loss for layer in outlier.analysis.sensitivity
    ]
    assert again.groups == outlier.analysis.groups


def test_other_data_have_measurements_of_their_own(outlier: Analyzed, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("A committee of nine members will report to the council. " * 20)
    analysis = analyze(
        outlier.model, tmp_path, text=other, calibration=planted.text(outlier.folder), recipe=planted.recipe(),
        tokens=64, window=32, work_dir=outlier.work_dir, steps=("quantized",),
    )  # fmt: skip
    assert analysis.measurements == 1
    assert analysis.quantized is not None and outlier.analysis.quantized is not None
    assert analysis.quantized.loss != outlier.analysis.quantized.loss


@pytest.mark.parametrize("step", ["baseline", "groups"])
def test_each_step_runs_alone(step: str, outlier: Analyzed, tmp_path: Path) -> None:
    analysis = analyze(
        outlier.model, tmp_path, text=planted.text(outlier.folder), calibration=planted.text(outlier.folder),
        recipe=planted.recipe(), tokens=64, window=32, work_dir=outlier.work_dir, steps=(step,),
    )  # fmt: skip
    assert (tmp_path / "report.html").is_file()
    assert (analysis.quantized is not None) == (step != "baseline")
    assert bool(analysis.groups) == (step in ("groups", "layers"))
    assert analysis.thresholds == []


def test_no_time_still_gives_an_answer(outlier: Analyzed, tmp_path: Path) -> None:
    analysis = planted.analyzed(outlier.model, tmp_path, minutes=0)
    assert analysis.measurements == 1
    assert analysis.skipped["Measuring layers"] == 12
    assert all(layer.metric_loss is None for layer in analysis.sensitivity)
    # The noise of the layers by themselves needs no measurement.
    assert analysis.sensitivity[0].name == "block.1.fc1"
    assert "time budget" in (tmp_path / "report" / "report.html").read_text()


def test_the_command_prints_and_goes_on_after_an_interrupt(
    outlier: Analyzed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = planted.text(outlier.folder)
    words = ["analyze", outlier.model, "--text", text, "--calibration", text, "--tokens", 64, "--window", 32]
    words += ["-o", tmp_path / "report", "--work-dir", tmp_path / "work", "--step", "layers"]
    words += [word for name, value in planted.RECIPE.items() for word in ("--set", f"{name}={value}")]

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fptq_onnx.analysis.analyze.measure_layers", interrupted)
        stopped = CliRunner().invoke(app, list(map(str, words)))
    assert stopped.exit_code == 75
    assert "Run the same command again to go on" in stopped.stderr and "Traceback" not in stopped.stderr
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    # The recipe and the groups were measured before the interrupt.
    assert found["measurements"] < 12 + 3 + len(outlier.analysis.groups)
    assert found["sensitivity"][0]["name"] == "block.1.fc1"


def test_bad_requests_are_refused_before_anything_is_written(outlier: Analyzed, tmp_path: Path) -> None:
    text = planted.text(tmp_path)
    with pytest.raises(RecipeError, match="it is unknown"):
        analyze(outlier.model, tmp_path / "report", text=text, steps=("everything",))  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"missing\.txt: there is no such file"):
        analyze(outlier.model, tmp_path / "report", text=tmp_path / "missing.txt")
    assert not (tmp_path / "report").exists()
    (tmp_path / "report").touch()
    with pytest.raises(ModelError, match="report: cannot be written: File exists"):
        analyze(outlier.model, tmp_path / "report", text=text)


def test_findings_are_sorted(outlier: Analyzed) -> None:
    priorities = [finding.priority for finding in outlier.analysis.findings]
    assert priorities == sorted(priorities, reverse=True)
    assert all(dataclasses.asdict(finding)["evidence"] for finding in outlier.analysis.findings)


def test_files_that_are_read_are_not_replaced(outlier: Analyzed, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((outlier.report / "recipe.yaml").read_text())
    before = recipe.read_bytes()
    with pytest.raises(ModelError, match=r"recipe\.yaml: this is a file that the analysis reads"):
        analyze(outlier.model, tmp_path, text=planted.text(outlier.folder), recipe=recipe)
    assert recipe.read_bytes() == before
