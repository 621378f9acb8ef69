"""Activation statistics are exact and do not depend on how the tokens were split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.errors import CalibrationError
from fptq_onnx.quantization.statistics import (
    HISTOGRAM_BINS,
    ActivationStatistics,
    histogram_bins,
    histogram_edges,
    histogram_of,
)

activations = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def assert_same(a: ActivationStatistics, b: ActivationStatistics) -> None:
    for name, array in a.to_dict().items():
        np.testing.assert_array_equal(array, b.to_dict()[name], err_msg=name)
        assert array.tobytes() == b.to_dict()[name].tobytes(), f"{name} differs in the sign of a zero"


@given(activations, st.data())
def test_merging_any_split_gives_the_same_bits(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    merged = ActivationStatistics.empty(x.shape[1])
    for part in np.split(x, cuts):
        merged = merged.merge(ActivationStatistics.from_activations(part))
    assert_same(merged, ActivationStatistics.from_activations(x))


@given(activations, st.randoms())
def test_only_token_absmax_follows_the_order_of_tokens(x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    whole, shuffled = ActivationStatistics.from_activations(x), ActivationStatistics.from_activations(x[order])
    np.testing.assert_array_equal(shuffled.token_absmax, whole.token_absmax[order])
    assert_same(whole, ActivationStatistics(**{**vars(shuffled), "token_absmax": whole.token_absmax}))


@given(activations)
def test_ranges_are_those_of_the_definition(x):
    s = ActivationStatistics.from_activations(x)
    assert s.absmax == np.abs(x).max()
    np.testing.assert_array_equal(s.channel_absmax, np.abs(x).max(axis=0))
    np.testing.assert_array_equal(s.token_absmax, np.abs(x).max(axis=1))
    assert s.histogram.sum() == x.size and s.tokens == len(x) and s.k == x.shape[1]


@given(st.floats(0, 65535, width=32))
def test_bins_hold_what_their_edges_say(value):
    edges = histogram_edges()
    index = int(histogram_bins(value))
    # One float32 rounding of the scaled root may cross an edge, not more.
    assert edges[index] <= value * (1 + 1e-6) and value * (1 - 1e-6) < edges[index + 1]


def test_histogram_of_known_values():
    # (i / 64) ** 4 is exact in float32 for i a multiple of 16.
    counts = histogram_of([0.0, 1.0, -1.0, 16.0, -1e30])
    assert counts[0] == 1 and counts[64] == 2 and counts[128] == 1 and counts[HISTOGRAM_BINS - 1] == 1


def test_round_trip_and_empty():
    s = ActivationStatistics.from_activations(np.arange(-6, 6, dtype=np.float16).reshape(1, 4, 3))
    assert_same(s, ActivationStatistics.from_dict(s.to_dict()))
    empty = ActivationStatistics.empty(3)
    assert_same(s, empty.merge(s).merge(empty))
    assert empty.absmax == 0 and not empty.channel_absmax.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(bad):
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        ActivationStatistics.from_activations([[1.0, bad]])


def test_parts_that_do_not_fit_are_refused():
    s = ActivationStatistics.from_activations(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="3 and 4 channels"):
        s.merge(ActivationStatistics.empty(4))
    with pytest.raises(ValueError, match="histogram"):
        ActivationStatistics(s.channel_min, s.channel_max, s.token_absmax[:1], s.histogram, 1)
