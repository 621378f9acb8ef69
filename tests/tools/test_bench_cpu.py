"""The CPU benchmark: its statistics, and a record that the common reader accepts."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path

import bench_cpu
import pytest


def test_measure_reports_medians_of_rounds() -> None:
    slow = cycle([0.004, 0.002, 0.003])
    times = bench_cpu.measure({"slow": lambda: next(slow), "fast": lambda: 0.001}, rounds=4, seconds=0.01)
    assert times["fast"] == {"median_ms": 1.0, "min_ms": 1.0, "max_ms": 1.0}
    assert 2.0 <= times["slow"]["min_ms"] <= times["slow"]["median_ms"] <= times["slow"]["max_ms"] <= 4.0


@pytest.mark.parametrize("cold", [False, True])
def test_record(
    cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    arguments = ["--shapes", "64x48", "--rows", "1,3", "--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *arguments, "--json", str(path), *(["--cold"] if cold else [])])
    bench_cpu.main()
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"kind", "created", "commit", "command", "protocol", "unavailable", "rows"} <= record.keys()
    assert [row["rows"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert list(row["times"]) == list(bench_cpu.MODELS)
        assert all(entry["median_ms"] > 0 for entry in row["times"].values())
    assert "64x48" in capsys.readouterr().out


def test_records_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "RECORDS", tmp_path)
    first = bench_cpu._record_path("2026-11-23T00:00:00", "AMD EPYC family 25 model 17")
    assert first.name == "2026-11-23-amd-epyc-family-25-model-17-cpu-kernels.json"
    first.write_text("{}", encoding="utf-8")
    assert bench_cpu._record_path("2026-11-23T00:00:00", "AMD EPYC family 25 model 17").stem.endswith("-kernels-2")
