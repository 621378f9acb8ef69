"""The grid of thresholds and the front."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fptq_onnx.analysis.experiments import Measurement
from fptq_onnx.analysis.mixed import _shortest
from fptq_onnx.analysis.result import StudyPoint
from fptq_onnx.analysis.study import mark_front, threshold_grid


@given(v0=st.sampled_from([0.0, 3.0, 15.0]), v1=st.sampled_from([15.0, 150.0, 777.0]))
def test_the_grid_starts_at_the_recipe_and_is_ordered(v0: float, v1: float) -> None:
    grid = threshold_grid(v0, v1)
    assert grid[0] == (v0, v1) and (0.0, 0.0) in grid
    assert all(a <= b for a, b in grid) and len(set(grid)) == len(grid)


@given(st.lists(st.tuples(st.floats(0.1, 2), st.floats(1, 9)), min_size=1, max_size=12))
def test_no_point_beats_one_on_the_front(values: list[tuple[float, float]]) -> None:
    points = [StudyPoint({}, 0, 0, loss, seconds, 1, 1) for loss, seconds in values]
    mark_front(points)
    front = [point for point in points if point.on_front]
    assert front
    for point in points:
        beaten = any(
            other.loss <= point.loss
            and other.seconds_per_batch <= point.seconds_per_batch
            and (other.loss < point.loss or other.seconds_per_batch < point.seconds_per_batch)
            for other in points
        )
        assert point.on_front is not beaten


@given(needed=st.integers(0, 40), most=st.integers(1, 40))
def test_the_list_of_float_layers_is_the_shortest(needed: int, most: int) -> None:
    tried = []

    def without(count: int) -> Measurement:
        tried.append(count)
        return Measurement(0.0 if count >= needed else 1.0)

    count, measured = _shortest(most, 0.5, without)
    assert measured is not None
    if needed <= most:
        assert count == needed and measured.loss == 0
    else:
        assert count == most and measured.loss == 1
    assert len(tried) <= 14
