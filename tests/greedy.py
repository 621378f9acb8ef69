"""Greedy generation by its definition, which the programs with a key/value cache are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fptq_onnx.evaluation.language_model import LanguageModel


def greedy(model: LanguageModel, prompt: Sequence[int], new: int) -> list[int]:
    """Run the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model.run(np.array(ids), "test")[0][-1].argmax()))
    return ids[len(prompt) :]
