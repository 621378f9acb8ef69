"""The fast scores against one reference are those of `score_tokens`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.perplexity import score_tokens
from fptq_onnx.evaluation.reference import Reference


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 500),
    spread=st.sampled_from([1e-3, 0.1, 1.0, 20.0]),
    distance=st.sampled_from([1e-4, 0.1, 3.0]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_scores_are_those_of_score_tokens(
    seed: int, rows: int, vocabulary: int, spread: float, distance: float, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    reference = (spread * rng.standard_normal((rows, vocabulary))).astype(dtype)
    logits = (reference + distance * rng.standard_normal((rows, vocabulary)) + 5).astype(dtype)
    targets = rng.integers(0, vocabulary, rows)
    fast, exact = Reference(reference, targets).score(logits), score_tokens(logits, targets, reference)
    assert exact.kl is not None and exact.reference_nll is not None
    np.testing.assert_allclose(fast.kl, exact.kl, atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(fast.nll, exact.nll, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(fast.reference_nll, exact.reference_nll, atol=2e-5, rtol=1e-5)
    np.testing.assert_array_equal(fast.agrees, exact.agrees)


def test_equal_logits_do_not_diverge() -> None:
    logits = np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)
    scores = Reference(logits, np.zeros(20, np.int64)).score(logits)
    assert scores.kl is not None and scores.kl.max() < 1e-12


def test_other_shapes_and_nan_are_refused() -> None:
    logits = np.zeros((3, 10), np.float32)
    reference = Reference(logits, np.zeros(3, np.int64))
    with pytest.raises(CalibrationError, match="one vocabulary"):
        reference.score(np.zeros((3, 11), np.float32))
    broken = logits.copy()
    broken[1, 2] = np.nan
    with pytest.raises(CalibrationError, match="NaN"):
        reference.score(broken)
