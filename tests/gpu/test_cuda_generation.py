"""Generation on CUDA: the cache stays on the device, and tokens are those of runs without a cache."""

from __future__ import annotations

import families
import pytest
from conversions import converted
from greedy import greedy

from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.decoder import Decoder
from fptq_onnx.generation.generate import generate

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7, 8], [200], [31, 14, 15]]
NEW = 16
FAMILIES = (families.GENAI_FP16, families.GENAI_FP32, families.DYNAMO_KV, families.DYNAMO_FP16)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "w4a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_batch(family: str, quantized: bool) -> None:
    path = converted("llama", family).path if quantized else families.model("llama", family).path
    model = open_language_model(path, "cuda")
    assert generate(model, PROMPTS, max_new_tokens=NEW).token_ids == [greedy(model, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_stays_on_the_device(family: str) -> None:
    decoder = Decoder(open_language_model(families.model("llama", family).path, "cuda"))
    decoder.start(PROMPTS, 8)
    decoder.extend([1, 2, 3])
    assert {value.device_name() for value in decoder._cache.values()} == {"cuda"}
