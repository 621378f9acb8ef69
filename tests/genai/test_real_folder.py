"""SmolLM2 through onnxruntime-genai: the folder that `convert` writes gives the tokens of a plain onnxruntime loop."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import real_conversions
import real_model
from genai_runs import generate_with_genai

import fptq_onnx
from fptq_onnx.calibration.tokens import encode_text, load_tokenizer, read_text
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.evaluation.perplexity import evaluate
from fptq_onnx.generation.generate import generate, stop_tokens

pytestmark = pytest.mark.slow

PROMPTS = (
    "Once upon a time, in a village by the sea,",
    "The three most important things to know about bread are",
    "def fibonacci(n):\n",
    "In the year 1848 the revolutions in Europe began when",
    "Dear Sir, I am writing to complain about the train that",
)


# The float16 folder is made for CUDA: here its operators run on the CPU in both programs.
@pytest.mark.parametrize(("family", "count", "new"), [(families.GENAI_FP32, 5, 64), (families.GENAI_FP16, 2, 32)])
def test_greedy_tokens(family: str, count: int, new: int) -> None:
    made = real_conversions.converted(family)
    folder = made.path.parent
    tokenizer = load_tokenizer(folder)
    prompts = [encode_text(tokenizer, prompt).tolist() for prompt in PROMPTS[:count]]
    model, stop = open_language_model(made.path, threads=1), stop_tokens(folder)
    plain = [generate(model, [prompt], max_new_tokens=new, stop=stop).token_ids[0] for prompt in prompts]
    assert generate_with_genai(folder, prompts, new) == [[id for id in row if id not in stop] for row in plain]
    assert sum(map(len, plain)) > count * new / 2


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_head_and_embedding_in_one_table(method: str, tmp_path: Path) -> None:
    """All other layers float: the table's bytes once in the file, its rows and products in both programs."""
    source = real_model.smollm2(families.GENAI_FP32)
    table = {"layers.lm_head": method, "layers.embedding": method, "layers.include": ["lm_head"]}
    # An equalized head would have other weights than the table.
    recipe = real_conversions.RECIPE.with_overrides({**table, "activations.v1": 15, "calibration.windows": 2})
    calibration = real_model.calibration_text()
    report = fptq_onnx.convert(source.parent, tmp_path / "out", calibration=calibration, recipe=recipe, verify_tokens=0)
    assert report.embedding == f"{method}, one table with the head"
    elements, scales = 49_152 * 576, 49_152 * (1 if method == "int8" else 5)
    once = elements * (1 if method == "int8" else 0.5) + 4 * scales
    made = tmp_path / "out" / "model.onnx"
    saved = source.with_name("model.onnx.data").stat().st_size - made.with_name("model.onnx.data").stat().st_size
    assert saved == pytest.approx(4 * elements - once, rel=2e-3)

    tokenizer = load_tokenizer(tmp_path / "out")
    text = encode_text(tokenizer, read_text(real_model.evaluation_text()))
    model = open_language_model(made, threads=1)
    found = evaluate(model, text, against=open_language_model(source), max_tokens=2 * 511)
    assert found.reference_perplexity is not None and found.kl_mean is not None
    assert found.perplexity < {"int8": 1.02, "int4": 1.3}[method] * found.reference_perplexity
    prompt = encode_text(tokenizer, PROMPTS[0]).tolist()
    (plain,) = generate(model, [prompt], max_new_tokens=16).token_ids
    assert generate_with_genai(tmp_path / "out", [prompt], 16) == [list(plain)]
