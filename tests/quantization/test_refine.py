import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.quantization.metrics import relative_mse
from fptq_onnx.quantization.refine import InputMoments, refine

MIX = np.random.default_rng(7).standard_normal((48, 48)) * np.geomspace(1, 0.1, 48)
WEIGHT = np.random.default_rng(8).standard_normal((48, 16)).astype(np.float32)


def inputs(tokens, seed):
    return (np.random.default_rng(seed).standard_normal((tokens, 48)) @ MIX.T).astype(np.float32)


def moments(x):
    m = InputMoments(x.shape[-1])
    m.seen += x.T @ x
    m.total += x.sum(axis=0)
    m.tokens += len(x)
    return m


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_moments_know_the_output_error(seed):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((40, 6)), rng.standard_normal((6, 3)).astype(np.float32)
    q = (np.rint(w * 4) / 4).astype(np.float32)
    assert moments(x).output_error(w, q) == pytest.approx(relative_mse(x @ w, x @ q), rel=1e-6)
    np.testing.assert_allclose(moments(x).output_shift(w, q), (x @ (w - q)).mean(axis=0), rtol=1e-4, atol=1e-6)


def test_zero_signal():
    m = InputMoments(3)
    assert m.output_error(np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32)) == 0


def test_gptq_is_kept_where_it_generalizes():
    refined = refine(WEIGHT, moments(inputs(2000, 1)), moments(inputs(500, 2)), 16, "weighted_clip", np.float16)
    assert refined.method == "gptq"
    assert refined.errors["gptq"] < 0.7 * refined.errors["round"]
    assert "gptq" in refined.reason and "round" in refined.reason


def test_gptq_is_refused_where_it_only_fits_its_data():
    # four tokens against 48 channels, judged on inputs of another distribution
    fresh = np.random.default_rng(3).standard_normal((500, 48)).astype(np.float32)
    refined = refine(WEIGHT, moments(inputs(4, 1)), moments(fresh), 16, "signed8", np.float16, damping=1e-4)
    assert refined.method == "round"
    assert refined.errors["gptq"] > refined.errors["round"]
