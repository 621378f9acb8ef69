"""The tiny models are what the other tests take them for."""

from __future__ import annotations

import families
import numpy as np
import pytest


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "qwen2", "gpt2"])
def test_families_of_one_architecture_compute_the_same(architecture: str) -> None:
    models = [families.model(*key) for key in families.ALL_MODELS if key[0] == architecture]
    token_ids = models[0].token_ids()
    expected = models[0].run(token_ids)
    for model in models[1:]:
        tolerance = 2e-2 if model.dtype == "float16" else 1e-5
        error = np.abs(model.run(token_ids) - expected).max() / np.abs(expected).max()
        assert error < tolerance, (model.family, error)


def test_outliers_put_layers_in_all_three_ranges() -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(families.checkpoint("llama"))
    ranges: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):

            def record(_layer: object, inputs: tuple[torch.Tensor], name: str = name) -> None:
                ranges[name] = float(inputs[0].detach().abs().max())

            layer.register_forward_pre_hook(record)
    model(torch.from_numpy(families.model("llama", families.DYNAMO).token_ids(4, 32)))

    projections = {
        "qkv": "self_attn.q_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    for block in range(families.BLOCKS):
        for role, projection in projections.items():
            label, v = f"block.{block}.{role}", ranges[f"model.layers.{block}.{projection}"]
            if label == "block.0.down":
                assert v > 300
            elif label in families.OUTLIERS:
                assert 20 < v < 120, label
            else:
                assert v < 10, label


def test_every_model_runs(tiny_model: families.TinyModel) -> None:
    logits = tiny_model.run(tiny_model.token_ids(batch=1, length=5))
    assert logits.shape[0] == 1 and np.isfinite(logits).all()
    assert tiny_model.tokenizer.is_file()
