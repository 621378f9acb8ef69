"""Measurements agree with the models that `convert` writes, and with a graph that is quantized as a whole."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import planted
import pytest

import fptq_onnx
from fptq_onnx.analysis.experiments import Experiment
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.request import Request
from fptq_onnx.calibration.tokens import encode_text, load_tokenizer, read_text
from fptq_onnx.errors import NothingQuantizedError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.evaluation.perplexity import evaluate


def _laboratory(folder: Path, family: str = families.DYNAMO, **overrides: object) -> Laboratory:
    tiny = families.model("llama", family)
    text = planted.text(folder)
    request = Request(tiny.path, text, text, tiny.tokenizer, planted.recipe(**overrides), tokens=64, window=32)
    return Laboratory(request, folder / "work", threads=1)


CHOOSES_BY_OUTPUTS = {
    "activations__static_range": "output",
    "equalization__method": "search",
    "fallback__float_layers": 3,
}


@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32])
@pytest.mark.parametrize(
    "overrides", [{}, {"rotation__residual": True, "weights__rounding": "gptq"}, CHOOSES_BY_OUTPUTS], ids=str
)
def test_the_whole_recipe_measures_like_the_converted_model(
    family: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    laboratory = _laboratory(tmp_path, family, **overrides)
    request = laboratory.request
    converted = tmp_path / "converted.onnx"
    fptq_onnx.convert(
        request.model, converted, calibration=request.calibration, recipe=request.recipe, verify_tokens=0,
        tokenizer=request.tokenizer,
    )  # fmt: skip
    assert request.tokenizer is not None
    ids = encode_text(load_tokenizer(request.tokenizer), read_text(request.text))
    judged = evaluate(
        open_language_model(converted, threads=1),
        ids,
        against=open_language_model(request.model, threads=1),
        window=32,
        max_tokens=62,
    )
    measured = laboratory.measure(Experiment()).figures
    assert judged.kl_mean is not None and judged.kl_mean > 0.01
    assert measured["kl"] == pytest.approx(judged.kl_mean, rel=2e-2)
    assert measured["perplexity"] == pytest.approx(judged.perplexity, rel=2e-2)


def test_a_run_that_starts_late_equals_one_that_starts_early(tmp_path: Path) -> None:
    """Float states in front of the first quantized segment are those that running it gives."""
    laboratory = _laboratory(tmp_path)
    chain, feeds = laboratory.subject(Experiment()).chain, laboratory.batches[0]
    names = laboratory.subject(Experiment()).names(("block.2.down",))
    late = chain.run(feeds, names)
    other = _laboratory(tmp_path).subject(Experiment()).chain
    other.run(feeds, laboratory.subject(Experiment()).names(None))
    np.testing.assert_array_equal(other.run(feeds, names)["logits"], late["logits"])


def test_single_layers_lose_less_than_all_and_float_loses_nothing(tmp_path: Path) -> None:
    laboratory = _laboratory(tmp_path)
    whole = laboratory.measure(Experiment()).loss
    single = laboratory.measure(Experiment(("block.1.up",))).loss
    assert 0 < single < whole
    assert laboratory.measure(Experiment(())).loss == 0
    # The head stays float in this recipe, so asking for it changes nothing.
    assert laboratory.measure(Experiment(("lm_head",))).loss == 0


def test_statistics_are_stored_and_read_again(tmp_path: Path) -> None:
    first = _laboratory(tmp_path)
    signature = first.planned(Experiment()).signature
    files = sorted(path.name for path in first.store.folder.glob("statistics-*.npz"))
    again = _laboratory(tmp_path)
    again.subject(Experiment())
    assert again.planned(Experiment()).signature == signature
    assert sorted(path.name for path in again.store.folder.glob("statistics-*.npz")) == files


def test_a_recipe_that_chooses_by_outputs_goes_on_from_what_is_stored(tmp_path: Path) -> None:
    """Its choices need samples of the activations, which a second process has from the store alone."""
    measured = _laboratory(tmp_path, **CHOOSES_BY_OUTPUTS).measure(Experiment())
    again = _laboratory(tmp_path, **CHOOSES_BY_OUTPUTS)
    assert again.measure(Experiment()).figures == measured.figures
    assert len(list(again.store.folder.glob("sampled-*.npz"))) == 1


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    converted = tmp_path / "model.onnx"
    tiny = families.model("llama", families.DYNAMO)
    text = planted.text(tmp_path)
    recipe = planted.recipe(layers__lm_head="int4")
    fptq_onnx.convert(tiny.path, converted, calibration=text, tokenizer=tiny.tokenizer, recipe=recipe, verify_tokens=0)
    with pytest.raises(NothingQuantizedError, match="float model"):
        Laboratory(Request(converted, text, text, tiny.tokenizer, recipe), tmp_path / "work")
