"""The report as JSON and as a table, and the progress that leads to it."""

from __future__ import annotations

import copy
import io
import json
import math
import time

import families
import pytest
from conversions import LENGTH, WINDOWS, converted
from rich.console import Console

from fptq_onnx.progress import SilentProgress, TerminalProgress
from fptq_onnx.report import Report, Stopwatch, peak_memory_bytes, show, versions


@pytest.fixture
def report() -> Report:
    return copy.deepcopy(converted("llama", families.DYNAMO).report)


def _shown(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(report, console)
    return console.file.getvalue()


def test_json_is_strict(report: Report) -> None:
    """No reader of JSON but Python's knows Infinity and NaN."""
    report.layers[0].snr_db = math.inf
    report.layers[1].range = math.nan
    report.verification.output_snr_db = -math.inf
    read = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert read["layers"][0]["snr_db"] is None and read["layers"][1]["range"] is None
    assert read["verification"]["output_snr_db"] is None
    assert read["layers"][2]["snr_db"] == report.layers[2].snr_db
    assert report.layers[0].snr_db == math.inf
    assert report.to_json().endswith("}\n")


def test_table(report: Report) -> None:
    text = _shown(report)
    (row,) = (line for line in text.splitlines() if "│ down " in line and "equalized-static" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    (layer,) = (layer for layer in report.layers if layer.label == "block.2.down")
    wanted = f"{layer.range:.1f} .. {layer.range:.1f}"
    assert cells == ["down", "equalized-static", "1", wanted, "linear", "absmax7 g32", f"{layer.snr_db:.1f}"]
    (row,) = (line for line in text.splitlines() if "│ o " in line)
    worst = min(layer.snr_db for layer in report.layers if layer.role == "o")
    assert f"│ {worst:.1f} │" in " ".join(row.split())
    assert "22 linear layers: 14 static, 1 per-token, 6 equalized-static, 1 float; 6 other" in text
    ratio = report.bytes_after / report.bytes_before
    assert f"{report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB ({ratio:.0%})" in text
    check = report.verification
    assert f"verified on {WINDOWS * LENGTH} tokens of {report.calibration}: mean KL {check.kl_mean:.4f} nats" in text
    assert f"top-1 agreement {check.top1_agreement:.1%}, output SNR {check.output_snr_db:.1f} dB" in text


def test_table_of_a_dry_run(report: Report) -> None:
    report.output = report.bytes_after = report.verification = None
    for layer in report.layers:
        layer.snr_db = None
    text = _shown(report)
    assert "-> dry run" in text and "MB" not in text and "verified" not in text
    assert all(line.rstrip("│ ").endswith(" -") for line in text.splitlines() if line.startswith("│ "))


def test_table_takes_names_as_they_are(report: Report) -> None:
    """Brackets are markup to rich, and would vanish."""
    report.model, report.verification.data = "dir[1]/model.onnx", "text[red].txt"
    text = _shown(report)
    assert "dir[1]/model.onnx" in text and "text[red].txt" in text


def test_missed_threshold_is_shown(report: Report) -> None:
    report.verification.max_kl, report.verification.passed = 0.01, False
    assert "mean KL is over the allowed 0.01" in _shown(report)
    report.verification.kl_mean = report.verification.top1_agreement = None
    text = _shown(report)
    assert "mean KL 0" not in text and "output SNR" in text


def test_stopwatch_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 22.0, 30.0, 31.25])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(2):
        with watch.stage("twice"):
            pass
    with pytest.raises(ValueError), watch.stage("fails"):
        raise ValueError
    assert watch.seconds == {"twice": 2.5, "fails": 1.25}


def test_environment() -> None:
    found = versions()
    import numpy
    import onnxruntime

    assert found["numpy"] == numpy.__version__ and found["onnxruntime"] == onnxruntime.__version__
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() > len(block)


def test_progress_off_a_terminal_is_one_line_per_stage() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    with progress.stage("Calibrating", 3) as advance:
        advance(1)
        advance(2)
    with progress.stage("Verifying") as advance:
        advance(1)
    titles = [line.split(": ") for line in stream.getvalue().splitlines()]
    assert [title for title, _ in titles] == ["Calibrating", "Verifying"]
    assert all(seconds.endswith(" s") for _, seconds in titles)
    with SilentProgress().stage("Nothing", 1) as advance:
        advance(1)


def test_progress_on_a_terminal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with TerminalProgress(stream).stage("Calibrating", 7) as advance:
        advance(7)
    assert "Calibrating" in stream.getvalue() and "7/7" in stream.getvalue()


def test_failed_stage_keeps_its_error() -> None:
    with pytest.raises(KeyError), TerminalProgress(io.StringIO()).stage("Broken"):
        raise KeyError("x")
