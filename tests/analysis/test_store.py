"""What is on disk survives a crash and is told apart by what it belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.store import Store, digest

FIRST = Experiment(("block.0.q",))
SECOND = Experiment.of({"weights.grid": "signed8", "layers.exclude": ["a", "b"]}, ("block.0.q",))


def test_measurements_are_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.record(FIRST, Measurement(0.25, {"kl": 0.25}, 1.5))
    store.record(SECOND, Measurement(0.5))
    again = Store(tmp_path / "new")
    assert len(again) == 2
    assert again.get(FIRST) == Measurement(0.25, {"kl": 0.25}, 1.5)
    assert again.get(SECOND) == Measurement(0.5)
    assert again.get(Experiment()) is None


def test_a_line_that_a_crash_cut_off_is_ignored_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record(FIRST, Measurement(0.25))
    with (tmp_path / "measurements.jsonl").open("a") as file:
        file.write('{"experiment": "[[')
    crashed = Store(tmp_path)
    assert len(crashed) == 1
    crashed.record(SECOND, Measurement(0.5))
    assert len(Store(tmp_path)) == 2


def test_arrays_and_values_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load_arrays("x") is None and store.load_json("x") is None
    store.save_arrays("x", {"a": np.arange(3), "b": np.ones((2, 2), np.float32)})
    found = store.load_arrays("x")
    assert found is not None
    np.testing.assert_array_equal(found["a"], np.arange(3))
    assert found["b"].dtype == np.float32
    store.save_json("x", {"n": [1, 2]})
    assert store.load_json("x") == {"n": [1, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz"]


@pytest.mark.parametrize("other", [Experiment(), SECOND, Experiment(("block.0.q",), (), "evaluation")])
def test_experiments_have_their_own_keys(other: Experiment) -> None:
    assert other.key != FIRST.key


def test_the_order_of_overrides_does_not_matter() -> None:
    assert Experiment.of({"a": 1, "b": 2}) == Experiment.of({"b": 2, "a": 1})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
