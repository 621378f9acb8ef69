import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.quantization import gptq as module
from fptq_onnx.quantization.gptq import gptq, inverse_factor
from fptq_onnx.quantization.int4 import MAX_MULTIPLE, quantize_weight, round_to_scales
from fptq_onnx.quantization.metrics import relative_mse

seeds = st.integers(0, 2**32 - 1)


def correlated(k, tokens=400, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * np.geomspace(1, 0.05, k)
    return rng.standard_normal((tokens, k)) @ mix.T


def problem(k=96, n=24, seed=0):
    x = correlated(k, seed=seed)
    w = np.random.default_rng(seed + 1).standard_normal((k, n)).astype(np.float32)
    return x, w, x.T @ x


@given(st.integers(1, 40), st.floats(1e-3, 1), seeds)
def test_inverse_factor(k, damping, seed):
    x = np.random.default_rng(seed).standard_normal((k + 3, k))
    h = x.T @ x
    u = inverse_factor(h, damping)
    np.testing.assert_array_equal(u, np.triu(u))
    identity = u.T @ u @ (h + damping * np.diag(h).mean() * np.eye(k))
    np.testing.assert_allclose(identity, np.eye(k), atol=1e-7)


def test_damping_grows_until_it_works():
    h = np.ones((8, 8)) - 0.05 * np.eye(8)
    u = inverse_factor(h, 0.01)
    np.testing.assert_allclose(u.T @ u @ (h + 0.1 * 0.95 * np.eye(8)), np.eye(8), atol=1e-9)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        inverse_factor(-np.eye(4) * 1e6 + np.eye(4), 0.01)
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(np.full((2, 2), np.nan), 0.01)


@given(st.integers(1, 50), st.sampled_from(["absmax7", "signed8", "mse_clip"]), st.sampled_from([5, 16]), seeds)
@settings(max_examples=40)
def test_uncorrelated_inputs_leave_nothing_to_compensate(k, grid, group, seed):
    w = np.random.default_rng(seed).standard_normal((k, 3)).astype(np.float32)
    plain = quantize_weight(w, group, grid, np.float16)
    for order in ("natural", "activation"):
        quantized = gptq(w, np.eye(k) * 7, group, grid, np.float16, order=order)
        np.testing.assert_array_equal(quantized.scale, plain.scale)
        np.testing.assert_array_equal(quantized.q, plain.q)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("multiple", [0, MAX_MULTIPLE])
@pytest.mark.parametrize("grid", ["absmax7", "signed8", "mse_clip", "weighted_clip"])
def test_lowers_the_output_error_also_on_fresh_data(grid, multiple, order):
    x, w, h = problem()
    quantized = gptq(w, h, 32, grid, np.float32, order=order, max_multiple=multiple)
    importance = np.diag(h)
    plain = quantize_weight(w, 32, grid, np.float32, importance=importance, max_multiple=multiple)
    fresh = correlated(96, seed=0)[::-1] + 0.01 * np.random.default_rng(9).standard_normal((400, 96))
    for data in (x, fresh):
        error = relative_mse(data @ w, data @ quantized.dequantize())
        assert error < 0.7 * relative_mse(data @ w, data @ plain.dequantize())
    assert quantized.scale_max_multiple == multiple and quantized.q.shape == w.shape


@pytest.mark.parametrize("group", [24, 32, 96, 100])
def test_blocks_of_rows_are_only_bookkeeping(monkeypatch, group):
    x, w, h = problem()
    whole = gptq(w, h, group, "signed8", np.float32)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 20)
    blocked = gptq(w, h, group, "signed8", np.float32)
    # other summation order: a value may fall on the other side of a tie
    assert np.mean(whole.q != blocked.q) < 0.02
    errors = [relative_mse(x @ w, x @ q.dequantize()) for q in (blocked, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_silent_channels_are_rounded_to_nearest():
    _, w, h = problem()
    h[5], h[:, 5] = 0, 0
    quantized = gptq(w, h, 32, "signed8", np.float32)
    np.testing.assert_array_equal(quantized.q[5], round_to_scales(w, quantized.scale, 32)[5])
    nothing = gptq(w, np.zeros_like(h), 32, "signed8", np.float32)
    np.testing.assert_array_equal(nothing.q, quantize_weight(w, 32, "signed8", np.float32).q)
