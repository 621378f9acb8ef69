"""Greedy generation by onnxruntime-genai, as its users write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def generate_with_genai(folder: Path, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """New tokens of each prompt; onnxruntime-genai leaves the stop token out."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.clear_providers()  # a folder for CUDA runs on the CPU then
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    model = og.Model(config)
    rows = []
    for prompt in prompts:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        rows.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
    return rows
