"""Processes and Ray actors measure what one process measures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import families
import planted
import pytest

from fptq_onnx.analysis.executors import Executor, ProcessExecutor, RayExecutor, SerialExecutor
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.request import Request
from fptq_onnx.errors import CalibrationError, RuntimeUnavailableError

EXPERIMENTS = [
    Experiment(),
    *(Experiment((f"block.{block}.{role}",)) for block in range(2) for role in ("o", "fc1", "fc2")),
    Experiment.of({"activations.v0": 0.0, "activations.v1": 0.0}),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, Path, dict[Experiment, Measurement]]:
    """A request, its work directory, and what this process measures."""
    folder = tmp_path_factory.mktemp("executors")
    text = planted.text(folder)
    tiny = families.model("gpt2", families.DYNAMO)
    request = Request(tiny.path, text, text, tiny.tokenizer, planted.recipe(), tokens=64, window=32)
    laboratory = Laboratory(request, folder / "work", threads=1)
    return request, folder / "work", dict(SerialExecutor(laboratory).run(EXPERIMENTS))


def _check(executor: Executor, wanted: dict[Experiment, Measurement]) -> None:
    try:
        # Read one by one, as a source with a deadline is.
        found = dict(executor.run(experiment for experiment in EXPERIMENTS))
    finally:
        executor.close()
    assert {e: measured.figures for e, measured in found.items()} == {e: m.figures for e, m in wanted.items()}


def test_two_processes_measure_the_same(
    prepared: tuple[Request, Path, dict[Experiment, Measurement]],
) -> None:
    request, folder, wanted = prepared
    _check(ProcessExecutor(request, folder, 2), wanted)


def test_two_ray_actors_measure_the_same(
    prepared: tuple[Request, Path, dict[Experiment, Measurement]],
) -> None:
    request, folder, wanted = prepared
    _check(RayExecutor(request, folder, "local", 2, 1), wanted)


def test_there_is_no_ray_cluster_at_a_wrong_address(
    prepared: tuple[Request, Path, dict[Experiment, Measurement]],
) -> None:
    request, folder, _ = prepared
    with pytest.raises(RuntimeUnavailableError, match="cannot be reached"):
        RayExecutor(request, folder, "no-such-scheme://nowhere", 1, 1)


def test_errors_of_a_worker_are_those_of_the_package(
    prepared: tuple[Request, Path, dict[Experiment, Measurement]],
) -> None:
    request, folder, _ = prepared
    executor = ProcessExecutor(Request(**vars(request) | {"metric": "nonsense"}), folder, 1)

    def results() -> Iterator[object]:
        yield from executor.run([Experiment()])

    try:
        with pytest.raises(CalibrationError, match="it is unknown"):
            list(results())
    finally:
        executor.close()


def test_a_killed_worker_is_said_to_be_killed(
    prepared: tuple[Request, Path, dict[Experiment, Measurement]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, folder, _ = prepared
    monkeypatch.setattr("fptq_onnx.analysis.executors._measure", _die)
    executor = ProcessExecutor(request, folder, 1)
    try:
        with pytest.raises(RuntimeUnavailableError, match=r"a measuring process: it was killed.*fewer --jobs"):
            list(executor.run(EXPERIMENTS))
    finally:
        executor.close()


def _die(_: Experiment) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
