"""The record of a conversion, also of one that was stopped in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import bench_convert
import families
import pytest


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.model("llama", families.GENAI_FP16).path
    paths = [str(model), str(tmp_path / "out.onnx"), "--record", str(tmp_path / "record.json")]
    options = ["--recipe", "paper", "--set=calibration.windows=2", "--verify-tokens=0", f"--work-dir={tmp_path / 'w'}"]
    stopped = subprocess.Popen([sys.executable, bench_convert.__file__, *paths, *options], stderr=subprocess.PIPE)
    assert stopped.stderr is not None
    assert any(line.startswith(b"estimate") for line in stopped.stderr), "it ended before it began to calibrate"
    children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    for process in (*children, stopped.pid):  # as a terminal does
        os.kill(int(process), signal.SIGINT)
    stopped.communicate(timeout=300)
    assert stopped.returncode == 75
    monkeypatch.setattr(sys, "argv", ["bench_convert.py", *paths, *options])
    assert bench_convert.main() == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record.keys() >= {"kind", "created", "commit", "command", "machine", "protocol", "rows"}
    assert [piece["status"] for piece in record["pieces"]] == [75, 0]
    assert all(piece["peak_bytes"] > 50e6 for piece in record["pieces"])
    assert [row["segment"] for row in record["rows"]] == ["embedding", "block 0", "block 1", "block 2"]
    assert all(row["calibrate"] > 0 for row in record["rows"])
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data", "out.json", "record.json"}
