"""The trainer makes Hugging Face directories that export takes, and learns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import train_lm

from fptq_onnx.export.pretrained import Kind, load_pretrained

WORDS = np.array(list("abcdefghijklmnop"))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_training_lowers_the_perplexity_and_saves_the_best(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WIDTH", 24), ("LAYERS", 1), ("WINDOW", 32), ("VOCABULARY", 320)):
        monkeypatch.setattr(train_lm, name, value)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 4000)), encoding="utf-8")
    output = tmp_path / "out"
    options = ["--text", str(text), "--evaluation", str(text), "--steps", "16", "--every", "8", "--batch", "8"]
    monkeypatch.setattr(sys, "argv", ["train_lm.py", architecture, str(output), "--device", "cpu", *options])
    assert train_lm.main() == 0
    found = json.loads((output / "training.json").read_text())
    history = [entry["perplexity"] for entry in found["history"]]
    assert found["perplexity"] == min(history) < history[0]
    loaded = load_pretrained(output, "float32")
    assert loaded.kind is Kind.DECODER and loaded.model.config.model_type == architecture
