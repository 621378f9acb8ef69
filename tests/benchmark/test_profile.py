"""Reading onnxruntime's profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fptq_onnx.benchmark.profile import read_profile
from fptq_onnx.errors import ModelError


def _node(ts: int, dur: int, name: str, shape: list[int] | None = None, op: str = "MatMul") -> dict[str, Any]:
    arguments = {"op_name": op, "provider": "CPUExecutionProvider"}
    if shape is not None:
        arguments["input_type_shape"] = [{"float": shape}]
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": arguments}


def _run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def _write(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(events))
    return path


def test_runs_are_told_apart(tmp_path: Path) -> None:
    """One warm-up, then two repetitions of a prefill and two steps; onnxruntime writes a run after its nodes."""
    events = [_node(1, 90, "a", [1, 8, 4]), _run(0, 100)]
    for start, prefill, steps in ((1000, 40, (4, 6)), (2000, 60, (8, 10))):
        events += [
            _node(start + 1, prefill, "a", [1, 8, 4]),
            _node(start + 70, 5, "b", [0], "Shape"),
            _run(start, 100 + prefill),
        ]
        for index, step in enumerate(steps):
            at = start + 300 + 100 * index
            # A body of a loop runs twice.
            events += [_node(at + 1, step, "a", [1, 1, 4]), _node(at + 20, step, "a", [1, 1, 4]), _run(at, 50 + step)]
    runs = read_profile(_write(tmp_path / "p.json", events), runs=2, steps=2)
    assert runs.prefill.run_microseconds == 150
    a, b = runs.prefill.nodes
    assert (a.name, a.op, a.provider, a.rows, a.microseconds) == ("a", "MatMul", "CPUExecutionProvider", 8, 50)
    assert (b.name, b.rows, b.microseconds) == ("b", 0, 5)
    assert runs.decode is not None and runs.decode.run_microseconds == 57
    (step,) = runs.decode.nodes
    assert step.rows == 1 and step.microseconds == 14


def test_no_decode_and_nodes_without_inputs(tmp_path: Path) -> None:
    runs = read_profile(_write(tmp_path / "p.json", [_node(1, 3, "c"), _run(0, 9)]), runs=1, steps=0)
    assert runs.decode is None and runs.prefill.nodes[0].rows == 0


@pytest.mark.parametrize("contents", ["", "{}", '[{"ts": 1}]', "[3]"])
def test_broken_profiles(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(contents)
    with pytest.raises(ModelError, match=r"p\.json: (is not a profile|holds 0 runs)"):
        read_profile(path, runs=1, steps=0)


def test_too_few_runs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds 1 runs, not 2"):
        read_profile(_write(tmp_path / "p.json", [_run(0, 1)]), runs=2, steps=0)
