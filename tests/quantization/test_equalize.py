import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.quantization.equalize import (
    channel_shift,
    equalized_absmax,
    lae_scale,
    round_mantissa,
    scale_rows,
    shift_output,
    smooth,
    smoothquant_scale,
    tie,
)

maxima = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 4096, width=32))


def published_lae(activation_scales):
    """The formula as FPTQ prints it and llm-compressor's log equalization computes it, in plain Python floats."""
    from math import log2

    return [m / log2(2 + m) for m in map(float, activation_scales)]


@given(maxima)
def test_lae_is_the_published_formula_where_no_trap_applies(m):
    expected = np.asarray(published_lae(m))
    live = m > 0
    scale = lae_scale(m, floor=0)
    np.testing.assert_allclose(scale[live], np.maximum(expected[live], np.finfo(np.float32).tiny), rtol=1e-6)
    assert (scale[~live] == 1).all()


@given(maxima, st.floats(0, 1))
def test_lae_traps(m, floor):
    scale = lae_scale(m, floor)
    assert scale.dtype == np.float32 and np.isfinite(scale).all() and (scale > 0).all()
    live = m > 0
    if live.any():
        assert scale[live].min() >= floor * np.median(np.asarray(published_lae(m[live]))) * (1 - 1e-6)
        # never wider than the logarithm promises
        assert (equalized_absmax(m, scale) <= np.log2(2 + m) * (1 + 1e-5)).all()


def test_lae_values():
    np.testing.assert_allclose(lae_scale(np.array([0, 2, 6, 14, 126.0])), [1, 1, 2, 3.5, 18], rtol=1e-6)
    np.testing.assert_allclose(lae_scale(np.array([1e-6, 2, 2, 2.0])), [1e-2, 1, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(lae_scale(np.zeros(3)), np.ones(3))


@given(maxima, st.floats(0, 1))
def test_smoothquant_is_the_published_formula(m, alpha):
    w = np.linspace(0, 2, m.size)
    scale = smoothquant_scale(m, w, alpha, floor=0)
    for mj, wj, sj in zip(map(float, m), map(float, w), scale, strict=True):
        expected = 1.0 if mj == 0 or wj == 0 else max(mj**alpha / wj ** (1 - alpha), 2.0**-126)
        assert sj == pytest.approx(expected, rel=1e-6)


@given(
    hnp.arrays(np.float64, (5, 8), elements=st.floats(-100, 100)),
    hnp.arrays(np.float32, (8, 3), elements=st.floats(-4, 4, width=32)),
)
def test_equalization_keeps_the_product(x, w):
    scale = lae_scale(np.abs(x).max(axis=0))
    got = (x / scale) @ scale_rows(w, scale).astype(np.float64)
    # diag(s) W is rounded once to float32
    np.testing.assert_allclose(got, x @ w, atol=1e-6 * float((np.abs(x) @ np.abs(w)).max()) + 1e-12)


@given(
    hnp.arrays(np.float32, (5, 8), elements=st.floats(-64, 64, width=16)),
    st.lists(st.integers(-6, 6), min_size=8, max_size=8),
)
def test_powers_of_two_are_exact(x, exponents):
    scale = np.exp2(np.asarray(exponents)).astype(np.float32)
    w = np.arange(24, dtype=np.float32).reshape(8, 3)
    np.testing.assert_array_equal((x / scale) * scale, x)
    np.testing.assert_array_equal(scale_rows(w, scale) / scale[:, None], w)


@given(hnp.arrays(np.float32, 12, elements=st.floats(0.125, 64, width=32)))
def test_tie_over_repeated_heads(scale):
    # 3 query heads of 4 channels over 1 key/value head
    channel_map = np.tile(np.arange(4), 3)
    tied = tie(scale, channel_map)
    np.testing.assert_array_equal(tied.reshape(3, 4), np.broadcast_to(scale.reshape(3, 4).max(axis=0), (3, 4)))
    np.testing.assert_array_equal(tie(tied, channel_map), tied)


magnitudes = hnp.arrays(np.float32, 20, elements=st.floats(2.0**-100, 2.0**100, width=32))


@given(magnitudes, st.integers(1, 8), st.integers(-3, 3))
def test_rounded_scales_ignore_last_bits(scale, bits, ulps):
    rounded = round_mantissa(scale, bits)
    assert (np.abs(rounded / scale.astype(np.float64) - 1) <= 2.0**-bits).all()
    np.testing.assert_array_equal(round_mantissa(rounded, bits), rounded)
    nudged = (scale.view(np.int32) + ulps).view(np.float32)
    digits = np.ldexp(np.frexp(scale.astype(np.float64))[0], bits)
    on_border = np.abs(digits - np.floor(digits) - 0.5) < 1e-4
    np.testing.assert_array_equal(round_mantissa(nudged, bits)[~on_border], rounded[~on_border])


extremes = hnp.arrays(np.float32, (2, 12), elements=st.floats(-1000, 1000, width=32))


@given(extremes)
def test_shift_halves_the_width_of_every_channel(ends):
    low, high = ends.min(axis=0), ends.max(axis=0)
    z = channel_shift(low, high, np.arange(12)).astype(np.float64)
    half = (high.astype(np.float64) - low) / 2
    np.testing.assert_allclose(high - z, half, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(z - low, half, rtol=1e-6, atol=1e-4)
    # so that no shift of its own gives any channel a smaller maximum
    assert (np.maximum(np.abs(low), np.abs(high)) >= half * (1 - 1e-6)).all()


@given(extremes)
def test_tied_channels_share_the_middle_of_all_their_ranges(ends):
    low, high = ends.min(axis=0), ends.max(axis=0)
    channel_map = np.tile(np.arange(4), 3)
    z = channel_shift(low, high, channel_map).reshape(3, 4)
    np.testing.assert_array_equal(z, np.broadcast_to(z[0], (3, 4)))
    together = (low.reshape(3, 4).min(axis=0).astype(np.float64) + high.reshape(3, 4).max(axis=0)) / 2
    np.testing.assert_allclose(z[0], together, rtol=1e-6, atol=1e-30)


@given(extremes, st.integers(2, 10))
def test_rounded_shifts_lie_within_their_bits_of_half_the_width(ends, bits):
    low, high = ends.min(axis=0), ends.max(axis=0)
    exact = (low.astype(np.float64) + high) / 2
    z = channel_shift(low, high, np.arange(12), bits)
    half = np.where(high > low, (high.astype(np.float64) - low) / 2, np.abs(exact))
    assert (np.abs(z - exact) <= half * 2.0**-bits * 1.001 + 1e-30).all()


def test_statistics_that_differ_in_their_last_bits_give_one_shift():
    rng = np.random.default_rng(0)
    low, high = -rng.uniform(1, 2, 1000).astype(np.float32), rng.uniform(1, 2, 1000).astype(np.float32)
    nudged = np.nextafter(high, np.float32(9))
    each = np.arange(1000)
    assert (channel_shift(low, high, each) != channel_shift(low, nudged, each)).any()
    np.testing.assert_array_equal(channel_shift(low, high, each, 8), channel_shift(low, nudged, each, 8))


def test_channels_never_seen_are_not_shifted():
    low, high = np.array([np.inf, 1, -2], np.float32), np.array([-np.inf, 5, -2], np.float32)
    assert channel_shift(low, high, np.arange(3), 8).tolist() == [0, 3, -2]
    assert channel_shift(low[:0], high[:0], np.arange(0)).shape == (0,)


@given(
    hnp.arrays(np.float64, (5, 8), elements=st.floats(-100, 100)),
    hnp.arrays(np.float32, (8, 3), elements=st.floats(-4, 4, width=32)),
    hnp.arrays(np.float32, 8, elements=st.floats(-100, 100, width=32)),
    st.booleans(),
)
def test_shift_and_scale_keep_the_output(x, w, z, scaled):
    """((X - z) / s) (s W) + z W = X W."""
    s = lae_scale(np.abs(x - z).max(axis=0)) if scaled else None
    rows = w if s is None else scale_rows(w, s)
    got = smooth(x, s, z) @ rows.astype(np.float64) + shift_output(z, w)
    size = float(((np.abs(x) + np.abs(z)) @ np.abs(w)).max())
    np.testing.assert_allclose(got, x @ w, atol=1e-6 * size + 1e-12)
    assert smooth(x, None, None) is x
