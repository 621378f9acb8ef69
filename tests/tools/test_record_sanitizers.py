"""The record of the sanitizers: all tests of a run that passed, or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import record_sanitizers

PASSED = '<testcase name="cpu_kernels" classname="cpu_kernels" time="1.234" status="run"/>'
FAILED = '<testcase name="concurrency" classname="concurrency" time="2" status="fail"><failure message=""/></testcase>'


def _results(folder: Path, *cases: str) -> Path:
    path = folder / "results.xml"
    path.write_text(f'<?xml version="1.0"?><testsuite name="x">{"".join(cases)}</testsuite>', encoding="utf-8")
    return path


def test_every_test_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, record = _results(tmp_path, PASSED), tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["record_sanitizers.py", f"thread={results}", "--json", str(record)])
    assert record_sanitizers.main() == 0
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["kind"] == "sanitize" and written["failures"] == 0
    assert written["command"].startswith("python tools/record_sanitizers.py thread=")
    assert written["rows"] == [{"sanitizers": "thread", "test": "cpu_kernels", "seconds": 1.23}]


@pytest.mark.parametrize(("cases", "reason"), [((PASSED, FAILED), "concurrency did not pass"), ((), "no test was run")])
def test_a_failure_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: tuple[str, ...], reason: str
) -> None:
    results, record = _results(tmp_path, *cases), tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["record_sanitizers.py", f"thread={results}", "--json", str(record)])
    with pytest.raises(SystemExit, match=reason):
        record_sanitizers.main()
    assert not record.exists()
