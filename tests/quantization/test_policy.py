import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.quantization.equalize import lae_scale, smoothquant_scale
from fptq_onnx.quantization.policy import PolicySettings, Scheme, activation_range, choose_scheme, decide

PAPER = PolicySettings()


def flat(*maxima):
    high = np.asarray(maxima, np.float32)
    return -high / 2, high


@pytest.mark.parametrize(
    ("v", "scheme"),
    [
        (0, Scheme.STATIC),
        (15, Scheme.STATIC),
        (math.nextafter(15, 16), Scheme.EQUALIZED_STATIC),
        (math.nextafter(150, 0), Scheme.EQUALIZED_STATIC),
        (150, Scheme.PER_TOKEN),
        (math.inf, Scheme.PER_TOKEN),
        (math.nan, Scheme.PER_TOKEN),
    ],
)
def test_bucket_boundaries(v, scheme):
    assert choose_scheme(v) is scheme


@given(st.floats(0, 1e5), st.floats(0, 1e3), st.floats(0, 1e3))
def test_buckets_are_ordered_by_range(v, a, b):
    v0, v1 = min(a, b), max(a, b)
    order = [Scheme.STATIC, Scheme.EQUALIZED_STATIC, Scheme.PER_TOKEN]
    assert order.index(choose_scheme(v, v0, v1)) <= order.index(choose_scheme(v + 1, v0, v1))


def test_the_three_buckets_and_their_reasons():
    static = decide(*flat(1, 2, 12), PAPER)
    assert (static.scheme, static.equalization_scale) == (Scheme.STATIC, None)
    assert static.reason == "range 12 up to 15: static"
    middle = decide(*flat(1, 2, 31.7), PAPER)
    assert middle.scheme is Scheme.EQUALIZED_STATIC and middle.equalization == "lae"
    assert middle.reason == "range 31.7 between 15 and 150: equalized to 5.075"
    np.testing.assert_array_equal(middle.equalization_scale, lae_scale(flat(1, 2, 31.7)[1]))
    assert middle.equalized_range == pytest.approx(math.log2(33.7), rel=1e-6)
    wide = decide(*flat(1, 2, 3112), PAPER)
    assert wide.scheme is Scheme.PER_TOKEN and wide.reason == "range 3112 from 150 on: per-token"


def test_negative_side_counts():
    assert decide(np.array([-20.0, -1]), np.array([1.0, 1]), PAPER).scheme is Scheme.EQUALIZED_STATIC


def test_span():
    low, high = np.array([-10.0, -1]), np.array([1.0, 9])
    assert activation_range(low, high) == 10
    assert activation_range(low, high, "span") == 19
    assert decide(low, high, PolicySettings(range_kind="span")).scheme is Scheme.EQUALIZED_STATIC


@pytest.mark.parametrize("scheme", [Scheme.STATIC, Scheme.PER_TOKEN, Scheme.FLOAT])
def test_an_override_ignores_the_range(scheme):
    for v in (1, 50, 5000):
        decision = decide(*flat(1, 1, v), PolicySettings(scheme=scheme))
        assert decision.scheme is scheme and decision.equalization == "none" and str(scheme) in decision.reason


def test_override_equalizes_everything():
    decision = decide(*flat(1, 1, 5000), PolicySettings(scheme=Scheme.EQUALIZED_STATIC))
    assert decision.scheme is Scheme.EQUALIZED_STATIC and decision.equalized_range < 13


def test_equalization_off():
    assert decide(*flat(1, 31), PolicySettings(equalization="none")).scheme is Scheme.PER_TOKEN
    forced = PolicySettings(equalization="none", scheme=Scheme.EQUALIZED_STATIC)
    assert decide(*flat(1, 31), forced).scheme is Scheme.STATIC


def test_equalization_that_cannot_help_is_refused():
    decision = decide(*flat(31, 31, 31), PAPER)
    assert decision.scheme is Scheme.PER_TOKEN and "does not even out" in decision.reason


def test_smoothquant_uses_the_weights():
    low, high = flat(1, 2, 40)
    settings = PolicySettings(equalization="smoothquant", alpha=0.6)
    w = np.array([1.0, 0.5, 0.25])
    decision = decide(low, high, settings, weight_absmax=w)
    np.testing.assert_array_equal(decision.equalization_scale, smoothquant_scale(high, w, 0.6))
    with pytest.raises(ValueError, match="maxima"):
        decide(low, high, settings)


def test_a_non_finite_range_stays_float():
    assert decide(np.array([-1.0]), np.array([np.inf]), PAPER).scheme is Scheme.FLOAT


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(0, 4096, width=16)))
def test_decisions_are_consistent(high):
    decision = decide(-high / 3, high, PAPER)
    assert (decision.equalization_scale is not None) == (decision.scheme is Scheme.EQUALIZED_STATIC)
    assert (decision.equalization != "none") == (decision.scheme is Scheme.EQUALIZED_STATIC)
    assert decision.activation_range == high.max()
    if decision.scheme is Scheme.EQUALIZED_STATIC:
        assert decision.equalized_range < decision.activation_range
    else:
        assert decision.equalized_range == decision.activation_range
