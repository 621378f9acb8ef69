"""The CPU benchmark: its statistics, and records that the common reader accepts."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path

import bench_cpu
import cpu_bench.kernels
import cpu_bench.llama_cpp
import cpu_bench.records
import families
import pytest
from cpu_bench.peers import OPENVINO
from cpu_bench.timing import measure
from cpu_bench.variants import write_variant

COMMON = {"kind", "created", "commit", "command", "machine", "protocol", "rows"}


def _record(arguments: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *arguments, "--json", str(path)])
    assert bench_cpu.main() == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record.keys() >= COMMON
    return record


def test_measure_reports_medians_of_rounds() -> None:
    slow = cycle([0.004, 0.002, 0.003])
    times = measure({"slow": lambda: next(slow), "fast": lambda: 0.001}, rounds=4, seconds=0.01)
    assert times["fast"] == {"median_ms": 1.0, "min_ms": 1.0, "max_ms": 1.0}
    assert 2.0 <= times["slow"]["min_ms"] <= times["slow"]["median_ms"] <= times["slow"]["max_ms"] <= 4.0


@pytest.mark.parametrize("cold", [False, True])
def test_kernels(
    cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["kernels", "--shapes", "64x48", "--rows", "1,3", "--threads", "1", "--rounds", "1"]
    arguments += ["--seconds", "0.001", *(["--cold"] if cold else [])]
    record = _record(arguments, tmp_path / "record.json", monkeypatch)
    assert [row["rows"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert list(row["times"]) == list(cpu_bench.kernels.MODELS)
        assert all(entry["median_ms"] > 0 for entry in row["times"].values())
    assert "64x48" in capsys.readouterr().out


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of a tiny decoder is written and runs both phases; the profile names the operators that ran."""
    source = families.model("llama", families.GENAI_FP32).path
    names = ["float32", "MatMulNBits b128", "dynamic int8", "W4A8", "W4A8 unfused", "W4A8 float head"]
    names += ["W4A8 onnxruntime attention"]
    arguments = ["models", str(source), "--variants", ",".join(names), "--prefill", "8", "--past", "8", "--profile"]
    arguments += ["--threads", "1", "--rounds", "1", "--seconds", "0.01", "--openvino", "--llama-cpp", "tiny.Q4_1.gguf"]
    monkeypatch.setattr(cpu_bench.llama_cpp, "is_installed", lambda: False)
    record = _record(arguments, tmp_path / "record.json", monkeypatch)
    assert [row["phase"] for row in record["rows"]] == ["prefill 8", "decode after 8"]
    for row in record["rows"]:
        assert list(row["tokens_per_s"])[: len(names)] == names and min(row["tokens_per_s"].values()) > 0
        # Each peer was measured, or the record says why not.
        assert set(OPENVINO) <= set(row["tokens_per_s"]) | set(record["unavailable"])
        assert record["unavailable"]["llama.cpp Q4_1"] == "xllamacpp is not installed"
    for profile in record["profile"].values():
        assert "SkipRMSNormQuantize" in profile["W4A8"] and "W8A8MatMul (head)" in profile["W4A8"]
        assert "PackedRotaryGroupQueryAttention" in profile["W4A8"]
        assert "GroupQueryAttention" in profile["W4A8 onnxruntime attention"]
        assert "QuantizeLinear" in profile["W4A8 unfused"] and "MatMul (head)" in profile["W4A8 float head"]


def test_a_kept_form_of_another_decoder_is_not_taken(tmp_path: Path) -> None:
    written = []
    for architecture in ("llama", "llama", "qwen2"):
        path = write_variant("W4A8", families.model(architecture, families.GENAI_FP32).path, tmp_path)
        written.append((path.read_bytes(), path.stat().st_mtime_ns))
    assert written[0] == written[1] and written[0][0] != written[2][0]


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory grows by at most 1.15 times the int4 bytes: the session holds the packed copy only."""
    record = _record(["memory", "--layers", "24"], tmp_path / "record.json", monkeypatch)
    (row,) = record["rows"]
    assert 1.0 <= row["resident_over_int4"] <= 1.15


def test_records_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_bench.records, "RECORDS", tmp_path)
    name = ("2026-11-23T00:00:00", "AMD EPYC family 25 model 17", "cpu-kernels")
    first = cpu_bench.records.record_path(*name)
    assert first.name == "2026-11-23-amd-epyc-family-25-model-17-cpu-kernels.json"
    first.write_text("{}", encoding="utf-8")
    assert cpu_bench.records.record_path(*name).stem.endswith("-kernels-2")
