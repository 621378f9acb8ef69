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


def moments(seen, reference=None):
    m = InputMoments(seen.shape[-1], paired=reference is not None)
    m.update(seen, reference)
    return m


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=25)
def test_moments_know_the_output_error(seed, paired):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((40, 6)), rng.standard_normal((6, 3)).astype(np.float32)
    q = (np.rint(w * 4) / 4).astype(np.float32)
    seen = (x + 0.1 * rng.standard_normal(x.shape)) if paired else x
    m = InputMoments(6, paired=paired)
    for part in np.array_split(np.arange(40), 3):
        m.update(seen[part].reshape(1, -1, 6), x[part] if paired else None)
    assert m.tokens == 40
    assert m.output_error(w, q) == pytest.approx(relative_mse(x @ w, seen @ q), rel=1e-3)


def test_long_updates_are_chunked(monkeypatch):
    x = inputs(100, 0)
    whole = moments(x)
    monkeypatch.setattr("fptq_onnx.quantization.refine._CHUNK_ROWS", 7)
    np.testing.assert_allclose(moments(x).seen, whole.seen, rtol=1e-4, atol=1e-3)


def test_mixing_paired_and_single_is_an_error():
    with pytest.raises(ValueError, match="paired"):
        moments(inputs(2, 0)).update(inputs(2, 0), inputs(2, 0))
    with pytest.raises(ValueError, match="paired"):
        InputMoments(48, paired=True).update(inputs(2, 0))


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


def test_damaged_inputs_are_compensated():
    def pair(tokens, seed):
        x = inputs(tokens, seed)
        return moments((np.rint(x / 2) * 2).astype(np.float32), x)

    held_out = pair(500, 2)
    refined = refine(WEIGHT, pair(3000, 1), held_out, 16, "weighted_clip", np.float32, damping=0.01)
    assert refined.method == "gptq+inputs"
    assert refined.errors["gptq+inputs"] < refined.errors["gptq"]
    assert held_out.output_error(WEIGHT, refined.weight.dequantize()) == refined.errors["gptq+inputs"]
