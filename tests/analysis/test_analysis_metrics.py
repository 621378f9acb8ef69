"""Metrics: what they ask of a model, what they call worse, and how they refuse data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import families
import numpy as np
import planted
import pytest

from fptq_onnx.analysis.experiments import Experiment
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.metrics import LastWordMetric, Passage
from fptq_onnx.analysis.request import Request, open_metric
from fptq_onnx.calibration.tokens import load_tokenizer
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.model_file import load_model


def _request(folder: Path, architecture: str = "gpt2", metric: str | None = None, **changes: object) -> Request:
    tiny = families.model(architecture, families.DYNAMO)
    settings: dict = {"tokens": 64, "window": 32} | changes
    text = settings.pop("text", None) or planted.text(folder)
    return Request(tiny.path, text, text, tiny.tokenizer, planted.recipe(), metric, **settings)


def test_a_language_model_is_judged_by_kl_and_an_encoder_by_cosine(tmp_path: Path) -> None:
    for architecture, name in (("gpt2", "kl"), ("bert-classifier", "cosine")):
        request = _request(tmp_path, architecture)
        metric, batches = open_metric(request, load_model(request.model))
        assert metric.name == name
        assert len(batches) == 2


@pytest.mark.parametrize(
    ("architecture", "metric"), [("gpt2", "perplexity"), ("gpt2", "last-word"), ("bert-classifier", "cosine")]
)
def test_worse_models_have_larger_losses(architecture: str, metric: str, tmp_path: Path) -> None:
    laboratory = Laboratory(_request(tmp_path, architecture, metric, tokens=256), tmp_path / "work")
    baseline = laboratory.baseline
    assert laboratory.metric.loss(baseline, baseline) == 0
    worse = dict(baseline)
    worse[metric] += -0.1 if laboratory.metric.higher_is_better else 0.1
    assert laboratory.metric.loss(worse, baseline) == pytest.approx(0.1)
    assert np.isfinite(laboratory.measure(Experiment()).loss)


def test_the_last_word_counts_only_whole(tmp_path: Path) -> None:
    tiny = families.model("gpt2", families.DYNAMO)
    tokenizer, inputs = load_tokenizer(tiny.tokenizer), describe_inputs(load_model(tiny.path))
    line = "She counted the coins twice before she paid"
    passage = Passage.of_text(line, tokenizer, inputs)
    assert passage is not None
    assert tokenizer.decode(list(passage.token_ids[passage.start :])).strip() == "paid"
    assert Passage.of_text("word", tokenizer, inputs) is None

    def predicting(right: int) -> Mapping[str, np.ndarray]:
        logits = np.zeros((1, passage.token_ids.size, families.VOCABULARY), np.float32)
        for position in range(passage.start, passage.start + right):
            logits[0, position - 1, passage.token_ids[position]] = 1
        return {"logits": logits}

    metric = LastWordMetric([passage], "logits")
    length = passage.token_ids.size - passage.start
    assert metric.evaluate(lambda feeds: predicting(length)) == {"last-word": 1.0}
    assert metric.evaluate(lambda feeds: predicting(length - 1)) == {"last-word": 0.0}


def test_a_python_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge.py").write_text(
        "import numpy as np\n"
        "def score(model):\n"
        "    return -float(np.abs(model({'input_ids': np.arange(8)[None]})['logits']).mean())\n"
        "def broken(model):\n"
        "    return 'good'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    laboratory = Laboratory(_request(tmp_path, metric="judge:score"), tmp_path / "work")
    assert laboratory.baseline["judge:score"] < 0
    assert laboratory.measure(Experiment()).loss != 0
    with pytest.raises(CalibrationError, match="not a number"):
        _ = Laboratory(_request(tmp_path, metric="judge:broken"), tmp_path / "work").baseline
    with pytest.raises(CalibrationError, match="cannot be imported"):
        Laboratory(_request(tmp_path, metric="judge:missing"), tmp_path / "work")


@pytest.mark.parametrize("metric", ["kl", "last-word"])
def test_unseen_text_lies_behind_what_was_seen(metric: str, tmp_path: Path) -> None:
    """And there is none where the text ends."""
    request = _request(tmp_path, metric=metric)
    model = load_model(request.model)
    seen, behind = (
        [batch["input_ids"].tolist() for batch in open_metric(dataclasses.replace(request, skip=skip), model)[1]]
        for skip in (0, 2)
    )
    assert len(seen) >= 2
    assert behind[: len(seen) - 2] == seen[2:]
    laboratory = Laboratory(dataclasses.replace(request, tokens=10_000), tmp_path / "work")
    assert laboratory.unseen_metric() is None


def test_metrics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="it is unknown"):
        Laboratory(_request(tmp_path, metric="accuracy"), tmp_path / "work")
    with pytest.raises(CalibrationError, match="no logits per token"):
        Laboratory(_request(tmp_path, "bert-classifier", "kl"), tmp_path / "work")
    for metric in ("perplexity", "last-word"):
        with pytest.raises(CalibrationError, match="depend on the tokens behind it"):
            _ = Laboratory(_request(tmp_path, "bert", metric), tmp_path / "work").baseline
    short = tmp_path / "short.txt"
    short.write_text("word\n")
    with pytest.raises(CalibrationError, match="no line is a passage"):
        Laboratory(_request(tmp_path, metric="last-word", text=short), tmp_path / "work")


def test_feeds_of_an_npz_file_replace_a_text(tmp_path: Path) -> None:
    feeds = tmp_path / "feeds.npz"
    ids = families.model("bert-classifier", families.DYNAMO).token_ids(3, 16)
    np.savez(feeds, input_ids=ids)
    laboratory = Laboratory(_request(tmp_path, "bert-classifier", text=feeds), tmp_path / "work")
    assert len(laboratory.batches) == 3
    assert laboratory.unseen_metric() is None
    assert laboratory.measure(Experiment()).loss > 0
