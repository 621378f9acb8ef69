"""SmolLM2 through onnxruntime-genai: the folder that `convert` writes gives the tokens of a plain onnxruntime loop."""

from __future__ import annotations

import families
import pytest
import real_conversions
from genai_runs import generate_with_genai

from fptq_onnx.calibration.tokens import encode_text, load_tokenizer
from fptq_onnx.evaluation.language_model import open_language_model
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
