"""Perplexity and divergence against direct formulas, on arrays and on tiny models."""

from __future__ import annotations

import dataclasses
import itertools

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization import quantize_dynamic

from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.language_model import LanguageModel, open_language_model
from fptq_onnx.evaluation.perplexity import divergence, evaluate, log_softmax, perplexity, score_tokens

logits_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
    elements=st.floats(-1e4, 1e4, width=32),
)


@settings(deadline=None, max_examples=50)
@given(logits_arrays, st.randoms())
def test_scores_are_those_of_torch(logits, random):
    reference = logits[:, ::-1] + np.float32(0.5)
    targets = np.array([random.randrange(logits.shape[1]) for _ in logits], np.int64)
    scores = score_tokens(logits, targets, reference)
    log_q, log_p = (torch.log_softmax(torch.tensor(x.copy(), dtype=torch.float64), -1) for x in (logits, reference))
    rows = torch.arange(len(logits))
    close = {"rtol": 1e-12, "atol": 1e-9}
    np.testing.assert_allclose(scores.nll, -log_q[rows, targets], **close)
    np.testing.assert_allclose(scores.reference_nll, -log_p[rows, targets], **close)
    np.testing.assert_allclose(scores.kl, (log_p.exp() * (log_p - log_q)).sum(-1), **close)
    np.testing.assert_array_equal(scores.agrees, logits.argmax(-1) == reference.argmax(-1))
    for part, whole in zip(divergence(reference, logits), (scores.kl, scores.agrees), strict=True):
        np.testing.assert_array_equal(part, whole)


def test_excluded_tokens_and_equal_models():
    logits = np.array([[1.0, -np.inf, 2.0]])
    scores = score_tokens(logits, np.array([2]), logits)
    assert scores.kl[0] == 0 and scores.agrees[0] and scores.nll[0] == pytest.approx(np.log(1 + np.exp(-1)))
    assert score_tokens(np.array([[-np.inf, 0.0]]), np.array([1]), np.array([[0.0, 0.0]])).kl[0] == np.inf
    assert np.exp(log_softmax(np.full((1, 4), 1e30, np.float32))).tolist() == [[0.25] * 4]


@dataclasses.dataclass
class Output:
    name: str
    shape: list[object]


class FakeSession:
    """A bigram model whose logits are known."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.lengths: list[int] = []

    def get_inputs(self):
        return [dataclasses.make_dataclass("Arg", ["name", "type", "shape"])("input_ids", "tensor(int64)", ["b", "s"])]

    def get_outputs(self):
        return [Output("logits", ["b", "s", len(self.table)])]

    def run(self, names, feeds):
        self.lengths.append(feeds["input_ids"].shape[1])
        return [self.table[feeds["input_ids"]]]


def test_conventions_of_windows():
    table = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)
    session = FakeSession(table)
    ids = np.random.default_rng(1).integers(0, 7, 23)
    result = perplexity(LanguageModel.from_session(session), ids, window=5)
    assert session.lengths[2:] == [5, 5, 5, 5]  # two runs tell whether it is causal; three tokens are dropped
    log_p = log_softmax(table)
    nll = [-log_p[a, b] for w in ids[:20].reshape(4, 5) for a, b in itertools.pairwise(w)]
    assert result.tokens == len(nll) == 16
    assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-12)
    assert result.tokens_per_second == pytest.approx(20 / result.seconds)
    assert perplexity(LanguageModel.from_session(session), ids, window=5, max_tokens=11).tokens == 8
    assert perplexity(LanguageModel.from_session(session), ids, window=5, max_tokens=1).tokens == 4


def test_one_pass_gives_both_models_and_their_divergence():
    rng = np.random.default_rng(0)
    table, ids = rng.standard_normal((7, 7)), rng.integers(0, 7, 40)
    other = table + 0.3 * rng.standard_normal((7, 7))
    model, reference = (LanguageModel.from_session(FakeSession(x.astype(np.float32))) for x in (other, table))
    result = evaluate(model, ids, against=reference, window=8)
    assert result.perplexity == perplexity(model, ids, window=8).perplexity
    assert result.reference_perplexity == pytest.approx(perplexity(reference, ids, window=8).perplexity)
    seen = ids.reshape(5, 8)[:, :-1].ravel()
    log_p, log_q = (log_softmax(x.astype(np.float32)) for x in (table, other))
    assert result.kl_mean == pytest.approx(np.mean((np.exp(log_p) * (log_p - log_q)).sum(1)[seen]))
    assert result.top1_agreement == np.mean((table.argmax(1) == other.argmax(1))[seen])
    same = evaluate(model, ids, against=model, window=8)
    assert (same.kl_mean, same.top1_agreement, same.reference_perplexity) == (0, 1, same.perplexity)
    alone = evaluate(model, ids, window=8)
    assert (alone.kl_mean, alone.top1_agreement, alone.reference_perplexity) == (None, None, None)


def test_families_of_one_checkpoint_agree():
    ids = families.model("llama", families.DYNAMO).token_ids(1, 40).ravel()
    opened = {family: open_language_model(families.model("llama", family).path, threads=1)
              for family in families.LLAMA_FAMILIES}  # fmt: skip
    base = opened[families.DYNAMO]
    for family, model in opened.items():
        result = evaluate(model, ids, against=base, window=16)
        exact = families.model("llama", family).dtype == "float32"
        assert result.tokens == 30
        assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-4 if exact else 2e-2)
        assert -1e-12 <= result.kl_mean < (1e-8 if exact else 1e-3)
        assert result.top1_agreement == 1 or not exact


def test_a_masked_language_model_has_no_perplexity():
    ids = families.model("bert", families.DYNAMO).token_ids(1, 40).ravel()
    model = open_language_model(families.model("bert", families.DYNAMO).path, threads=1)
    causal = open_language_model(families.model("llama", families.DYNAMO).path, threads=1)
    for arguments in ({"model": model}, {"model": causal, "against": model}):
        with pytest.raises(CalibrationError, match=r"bert/.*depend on the tokens behind it.*--metric cosine"):
            evaluate(token_ids=ids, window=16, **arguments)


def test_int8_with_one_scale_for_all_tokens_is_still_causal(tmp_path):
    """onnxruntime's dynamic quantization moves a token's logits with those behind it, by rounding only."""
    tiny = families.model("llama", families.DYNAMO)
    quantize_dynamic(tiny.path, tmp_path / "int8.onnx")
    model = open_language_model(tmp_path / "int8.onnx", threads=1)
    assert model.causal
    assert evaluate(model, tiny.token_ids(1, 40).ravel(), window=16).tokens == 30


@pytest.mark.parametrize(
    ("ids", "window", "reason"),
    [
        (np.zeros(3, int), 8, "holds 3 tokens, less than one window of 8"),
        (np.zeros(9, int), 1, "window: of 1 tokens predicts nothing"),
        (np.full(9, families.VOCABULARY), 8, "window 0: holds token id 323, outside the model's vocabulary"),
    ],
)
def test_data_that_do_not_fit(ids, window, reason):
    model = open_language_model(families.model("llama", families.DYNAMO).path, threads=1)
    with pytest.raises(CalibrationError, match=reason):
        perplexity(model, ids, window=window)


def test_models_that_do_not_fit():
    small, large = (LanguageModel.from_session(FakeSession(np.zeros((n, n), np.float32)), name=f"v{n}") for n in (5, 6))
    with pytest.raises(CalibrationError, match="v6: has 6 logits per token, but v5 has 5"):
        evaluate(small, np.zeros(8, int), against=large, window=4)
    with pytest.raises(CalibrationError, match="token id 5, and v5 predicts 5"):
        evaluate(
            LanguageModel.from_session(FakeSession(np.zeros((6, 5), np.float32)), name="v5"), np.full(8, 5), window=4
        )
    broken = LanguageModel.from_session(FakeSession(np.full((5, 5), np.nan, np.float32)), name="broken")
    with pytest.raises(CalibrationError, match="broken, window 0: gives logits that are NaN"):
        evaluate(broken, np.zeros(8, int), window=4)
    with pytest.raises(CalibrationError, match="broken, window 0: gives logits that are NaN"):
        evaluate(small, np.zeros(8, int), against=broken, window=4)
    with pytest.raises(CalibrationError, match="no output of logits among token_scores, last_hidden_state"):
        LanguageModel.from_session(Encoder())


class Encoder(FakeSession):
    def __init__(self) -> None:
        super().__init__(np.zeros((2, 2)))

    def get_outputs(self):
        return [Output("token_scores", ["b", "s", 8]), Output("last_hidden_state", ["b", "s", 8])]
