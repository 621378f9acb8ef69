"""SmolLM2, from a GGUF file to the graph families: the weights arrive where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import onnxruntime
import pytest
import tokenizers

pytestmark = pytest.mark.slow

PROMPT, ANSWER = "The capital of France is", " Paris"


def _last_logits(path: Path, family: str, token_ids: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = families.TinyModel(path, "llama", family, path.parent, 49152, blocks=30, kv_heads=3, head_size=64).feeds(
        token_ids
    )
    return session.run(["logits"], feeds)[0][0, -1].astype(np.float32)


def test_families_agree_and_know_the_capital_of_france(smollm2: Callable[[str], Path]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2(families.DYNAMO).with_name("tokenizer.json")))
    token_ids = np.array([tokenizer.encode(PROMPT).ids])
    expected = _last_logits(smollm2(families.DYNAMO), families.DYNAMO, token_ids)
    assert tokenizer.decode([int(expected.argmax())]) == ANSWER
    for family, tolerance in ((families.DYNAMO_KV, 1e-5), (families.GENAI_FP32, 1e-4), (families.GENAI_FP16, 2e-2)):
        error = np.abs(_last_logits(smollm2(family), family, token_ids) - expected).max() / np.abs(expected).max()
        assert error < tolerance, (family, error)
