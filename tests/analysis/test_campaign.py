"""Experiments in order, within the time, none of them twice."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fptq_onnx.analysis.campaign import Campaign
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.store import Store
from fptq_onnx.progress import SilentProgress

EXPERIMENTS = [Experiment((f"layer {index}",)) for index in range(5)]


class Counting:
    """An executor that takes a second of a clock per experiment."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.ran: list[Experiment] = []

    def run(self, experiments: Iterable[Experiment]) -> Iterator[tuple[Experiment, Measurement]]:
        for experiment in experiments:
            self.clock[0] += 1
            self.ran.append(experiment)
            yield experiment, Measurement(float(len(self.ran)))

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("fptq_onnx.analysis.campaign.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def _campaign(folder: Path, clock: list[float], seconds: float | None) -> tuple[Campaign, Counting]:
    laboratory: Any = types.SimpleNamespace(store=Store(folder))
    executor = Counting(clock)
    return Campaign(laboratory, executor, seconds, SilentProgress()), executor


def test_time_ends_the_list_and_what_is_left_out_is_counted(tmp_path: Path, clock: list[float]) -> None:
    campaign, executor = _campaign(tmp_path, clock, 3.0)
    found = campaign.several(EXPERIMENTS, "Measuring layers")
    assert executor.ran == EXPERIMENTS[:3] == list(found)
    assert campaign.skipped == {"Measuring layers": 2}
    assert campaign.seconds_left == 0


def test_a_step_may_use_its_share(tmp_path: Path, clock: list[float]) -> None:
    campaign, executor = _campaign(tmp_path, clock, 8.0)
    campaign.several(EXPERIMENTS, "Measuring layers", campaign.until(0.25))
    assert executor.ran == EXPERIMENTS[:2]


def test_nothing_is_measured_twice(tmp_path: Path, clock: list[float]) -> None:
    campaign, executor = _campaign(tmp_path, clock, None)
    campaign.several([*EXPERIMENTS[:2], EXPERIMENTS[0]], "first")
    found = campaign.several(EXPERIMENTS, "second")
    assert executor.ran == EXPERIMENTS and campaign.made == 5 and set(found) == set(EXPERIMENTS)
    again, idle = _campaign(tmp_path, clock, 0.0)
    assert again.several(EXPERIMENTS, "third") == found
    assert idle.ran == [] and again.skipped == {} and again.until(0.5) == clock[0]
