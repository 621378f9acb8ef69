"""Second moments reduced inside the graph equal those of the exposed activations, tokens capped and batches split."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_model import observe

from fptq_onnx.calibration.moments import (
    BYTES_PER_ENTRY,
    HELD_OUT_EVERY,
    FirstTokenObserver,
    SecondMomentObserver,
    passes_within,
)
from fptq_onnx.calibration.runner import ObservedRun, token_masks
from fptq_onnx.errors import CalibrationError

K = 6
RNG = np.random.default_rng(3)


def model() -> ir.Model:
    return ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 21]>
        g (float[b, s, {K}] x) => (float[b, s, {K}] y)
        {{
            hidden = Relu(x)
            y = Abs(hidden)
        }}""")


def moments(batches: list[np.ndarray], cap: float) -> SecondMomentObserver:
    observer = SecondMomentObserver("hidden", K, cap)
    observe(model(), [observer], [{"x": batch} for batch in batches])
    return observer


def expected(batches: list[np.ndarray], cap: float) -> np.ndarray:
    total = np.zeros((K, K))
    for batch in batches:
        x = np.maximum(batch, 0).reshape(-1, K).astype(np.float64)
        peak = np.abs(x).max(axis=1, keepdims=True)
        x = x * np.minimum(1, cap / np.maximum(peak, 1e-30))
        total += x.T @ x
    return total


@pytest.mark.parametrize("cap", [math.inf, 1.5])
def test_equals_numpy_and_splits_every_fourth_batch_off(cap: float) -> None:
    batches = [RNG.standard_normal((2, 3 + i, K)).astype(np.float32) * (1 + 10 * (i == 2)) for i in range(8)]
    got = moments(batches, cap).moments
    held_out = batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    fit = [batch for i, batch in enumerate(batches) if (i + 1) % HELD_OUT_EVERY]
    np.testing.assert_allclose(got.fit.seen, expected(fit, cap), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.held_out.seen, expected(held_out, cap), rtol=1e-5, atol=1e-5)
    plain = sum(np.maximum(batch, 0).reshape(-1, K).sum(axis=0, dtype=np.float64) for batch in fit)
    np.testing.assert_allclose(got.fit.total, plain, rtol=1e-5)
    assert got.fit.tokens == sum(batch.shape[0] * batch.shape[1] for batch in fit)
    assert got.held_out.tokens == sum(batch.shape[0] * batch.shape[1] for batch in held_out)


def test_a_cap_bounds_what_one_token_adds() -> None:
    tokens = np.ones((1, 9, K), np.float32)
    tokens[0, 0, 2] = 1e4
    assert moments([tokens], 2.0).moments.fit.seen[2, 2] <= 8 + 2.0**2 + 1e-4
    assert moments([tokens], math.inf).moments.fit.seen[2, 2] >= 1e8


@pytest.mark.parametrize(
    ("size", "typical", "times"), [(1.0, 1.0, 32), (0.1, 1.0, 32), (4.0, 1.0, 2), (100.0, 1.0, 1), (5.0, math.inf, 32)]
)
def test_the_first_token_counts_more_unless_it_is_large_already(size: float, typical: float, times: float) -> None:
    batches = [RNG.uniform(0.1, 1, (2, 3, K)).astype(np.float32) for _ in range(5)]
    for batch in batches:
        batch[:, 0] *= size / batch[:, 0].max(axis=1, keepdims=True)
    observed = SecondMomentObserver("hidden", K, math.inf)
    run = ObservedRun(model(), [observed, FirstTokenObserver(observed, 32, typical)])
    positions = np.tile(np.arange(3), (2, 1))
    for batch in batches:
        run.feed({"x": batch}, token_masks(positions, 1, "a batch"), positions, "a batch")
    wanted = [expected([b], math.inf) + (times - 1) * expected([b[:, :1]], math.inf) for b in batches]
    np.testing.assert_allclose(observed.moments.held_out.seen, wanted[3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(observed.moments.fit.seen, sum(wanted[:3]) + wanted[4], rtol=1e-4, atol=1e-5)
    assert observed.moments.fit.tokens == 4 * 6


def test_tokens_of_zeros_add_nothing() -> None:
    got = moments([np.zeros((1, 4, K), np.float32)], 1.0).moments.fit
    assert not got.seen.any() and got.tokens == 4


def test_infinite_activations_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"activation hidden.*holds NaN, infinity, or values whose"):
        moments([np.full((1, 2, K), np.inf, np.float32)], math.inf)


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 40_000))
def test_passes_keep_order_and_stay_within_the_budget(sizes: list[int], budget: int) -> None:
    channels = {f"a{i}": k for i, k in enumerate(sizes)}
    runs = list(passes_within(channels, budget))
    assert [name for run in runs for name in run] == list(channels)
    for run in runs:
        assert len(run) == 1 or sum(BYTES_PER_ENTRY * channels[name] ** 2 for name in run) <= budget
