import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.quantization.equalize import channel_shift
from fptq_onnx.quantization.metrics import relative_mse
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.quantization.search import (
    ALPHAS,
    OutputError,
    quantize_per_token,
    quantize_static,
    search_range,
    search_scheme,
    token_weights,
)

values = hnp.arrays(np.float32, (4, 6), elements=st.floats(-1000, 1000, width=32))


@given(values)
def test_per_token_errs_by_half_a_step_of_its_own_token(x):
    error = np.abs(quantize_per_token(x) - x)
    # Subnormal steps have few bits left, or none.
    step = np.maximum(np.abs(x).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    assert (error <= step * 0.5001).all()


@given(values)
def test_static_errs_by_half_a_step_inside_and_clips_outside(x):
    kept = quantize_static(x, -127, 127)
    inside = np.abs(x) <= 127
    assert (np.abs(kept - x)[inside] <= 0.5001).all()
    assert ((kept >= -128) & (kept <= 127)).all()
    positive = quantize_static(np.abs(x), 0, 255, symmetric=False)
    np.testing.assert_array_equal(positive, np.clip(np.rint(np.abs(x)), 0, 255))


def search(x, weights, **kwargs):
    defaults = {"group_size": 32, "grid": "signed8"}
    return search_scheme(x, weights, x.min(axis=0), x.max(axis=0), **(defaults | kwargs))


def activations(kind, tokens=200, k=64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    if kind == "outlier channels":
        x[:, ::16] *= 60
    if kind == "sink token":
        x[0] *= 1000
    return x


WEIGHTS = [np.random.default_rng(i).standard_normal((64, n)).astype(np.float32) for i, n in enumerate((16, 8))]


def test_even_channels_are_plain_static():
    x = np.random.default_rng(0).uniform(-1, 1, (200, 64)).astype(np.float32)
    x[0] = 1
    even = np.random.default_rng(1).choice([-1.0, 1.0], (64, 16)).astype(np.float32)
    chosen = search(x, [even]).chosen
    assert chosen.scheme is Scheme.STATIC and chosen.scale is None


def test_outlier_channels_are_equalized():
    result = search(activations("outlier channels"), [w * np.float32(0.05) for w in WEIGHTS], tolerance=1.0)
    assert result.chosen.scheme is Scheme.EQUALIZED_STATIC
    plain = next(c for c in result.candidates if c.scheme is Scheme.STATIC)
    assert result.chosen.error < plain.error
    assert str(result.chosen.scheme) in result.reason


def test_a_sink_token_needs_its_own_scale():
    x = activations("sink token")
    # the sink dominates any sum of squares, so judge the other tokens
    result = search_scheme(x[1:], WEIGHTS, x.min(axis=0), x.max(axis=0), group_size=32, grid="signed8")
    assert result.chosen.scheme is Scheme.PER_TOKEN


def test_every_candidate_is_there_and_ordered():
    result = search(activations("outlier channels"), WEIGHTS)
    assert len(result.candidates) == 3 + len(ALPHAS)
    errors = [c.error for c in result.candidates[1:]]
    assert errors == sorted(errors)
    tolerant = search(activations("sink token"), WEIGHTS, tolerance=1e9)
    assert tolerant.chosen.scheme.is_static


def test_the_error_is_that_of_the_quantized_layers():
    x = activations("gaussian")
    result = search(x, WEIGHTS[:1], group_size=64, grid="absmax7")
    plain = next(c for c in result.candidates if c.scheme is Scheme.STATIC)
    w = WEIGHTS[0]
    step = np.abs(w).max(axis=0) / np.float32(7)
    seen = quantize_static(x, float(x.min()), float(x.max()))
    assert plain.error == pytest.approx(relative_mse(x @ w, seen @ (np.rint(w / step) * step)), rel=1e-4)


def test_sinks_count_no_more_than_the_cap():
    x = activations("sink token")
    weights = token_weights(x, 16)
    assert (weights[1:] == 1).all() and weights[0] < 1e-3
    assert (token_weights(x, 0) == 1).all()
    # so that the other tokens are seen, which a static scale of the sink's range would erase
    assert search(x, WEIGHTS, tolerance=1.0).chosen.scheme is Scheme.PER_TOKEN


def test_the_range_is_chosen_by_what_the_outputs_need():
    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    x[:, 5] = 20 * np.sign(x[:, 5])
    ranges = {"absmax": (-20.0, 20.0), "mse": (-4.0, 4.0)}
    heard, unheard = np.ones((64, 8), np.float32), np.ones((64, 8), np.float32)
    unheard[5] = 0
    assert search_range(x, [heard], ranges) == "absmax"
    assert search_range(x, [unheard], ranges) == "mse"
    assert search_range(x, [unheard, heard], ranges) == "absmax"


def off_centre(tokens=200, k=64):
    """Every channel far off zero, half of them on either side: where a zero point cannot help."""
    rng = np.random.default_rng(0)
    centre = np.where(np.arange(k) % 2, 20, -20) * rng.uniform(0.5, 1, k)
    return (rng.standard_normal((tokens, k)) + centre).astype(np.float32)


def middle(x):
    return channel_shift(x.min(axis=0), x.max(axis=0), np.arange(x.shape[1]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_on_both_sides_of_zero_are_shifted(symmetric):
    x = off_centre()
    result = search(x, WEIGHTS, symmetric=symmetric, shift=middle(x))
    assert len(result.candidates) == 2 * (3 + len(ALPHAS))
    assert result.chosen.shift is not None and "shifted" in result.reason
    for scheme in Scheme.STATIC, Scheme.PER_TOKEN:
        without, shifted = (
            next(c.error for c in result.candidates if c.scheme is scheme and (c.shift is not None) is wanted)
            for wanted in (False, True)
        )
        assert shifted < 0.5 * without


def test_no_shift_changes_nothing():
    x = activations("outlier channels")
    plain, offered = search(x, WEIGHTS), search(x, WEIGHTS, shift=np.zeros(64, np.float32))
    assert [c.error for c in plain.candidates] == [c.error for c in offered.candidates if c.shift is None]
    assert plain.chosen.error == offered.chosen.error and offered.chosen.shift is None
    assert plain.reason == offered.reason


@given(hnp.arrays(np.float32, 64, elements=st.floats(-50, 50, width=32)))
@settings(max_examples=20, deadline=None)
def test_a_shifted_activation_is_judged_as_if_it_had_come_shifted(z):
    """The layers' biases give back z W in full precision, so that only X - z meets rounding."""
    x = activations("gaussian")
    given_off, given_centred = (
        OutputError(
            value, WEIGHTS[:1], value.min(axis=0), value.max(axis=0), group_size=32, grid="signed8", token_cap=0
        )
        for value in (x + z, x)
    )
    signal = np.sum(((x + z) @ WEIGHTS[0]) ** 2.0) / np.sum((x @ WEIGHTS[0]) ** 2.0)
    assert given_off(shift=z) * signal == pytest.approx(given_centred(), rel=2e-2)


def test_bias_correction_takes_the_mean_out_of_the_error():
    x = off_centre()
    without, with_it = (
        OutputError(x, WEIGHTS, x.min(axis=0), x.max(axis=0), group_size=32, grid="signed8", bias_correction=correct)
        for correct in (False, True)
    )
    assert with_it(per_token=True) < 0.7 * without(per_token=True)
    # around the middle little is left to correct
    z = middle(x)
    assert with_it(shift=z) == pytest.approx(without(shift=z), rel=0.1)


def test_weights_may_stay_float():
    x = activations("gaussian")
    error = OutputError(x, WEIGHTS, x.min(axis=0), x.max(axis=0), group_size=32, grid=None)
    assert 0 < error() < 1e-3
