#!/usr/bin/env python3
"""Trains a small language model from scratch: one whose weights were never quantized, of an architecture of choice.

    python tools/train_lm.py gpt2 OUT     # LayerNorm, learned positions, biases, plain MLP with GELU, fused q/k/v
    python tools/train_lm.py llama OUT    # RMSNorm, rotary positions, grouped-query attention, gated MLP

Registries hold language models that were quantized before they were packaged; rounding those again is cheaper or
dearer than rounding a trained model. The two networks here have 13 and 14 million parameters, a vocabulary of 8192
that is made from the same text, and are trained on the Brown corpus without its evaluation and calibration texts and
on addresses of presidents without those that are evaluated on. OUT becomes a Hugging Face directory with float16
weights. A minute on a data-centre GPU, some hours on a few cores; the same seed on the same machine gives the same
text to learn from in the same order.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["main"]

VOCABULARY, WINDOW, WIDTH, LAYERS, HEADS = 8192, 512, 384, 6, 6
END = "<|endoftext|>"


def main() -> int:
    """Train, keep the weights of the best evaluation, and save them; returns the exit status."""
    arguments = _arguments()
    if arguments.text is None or arguments.evaluation is None:
        sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
        import assets

        arguments.text, arguments.evaluation = assets.training_text(), assets.brown_text().evaluation
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(arguments.text.read_text(encoding="utf-8"))
    tokenizer.save(str(output / "tokenizer.json"))
    text, held_out = (
        torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")).ids)
        for path in (arguments.text, arguments.evaluation)
    )
    print(f"{len(text)} tokens to train on, {len(held_out)} to evaluate on", file=sys.stderr)
    torch.manual_seed(arguments.seed)
    network = build(arguments.architecture).to(arguments.device)
    found = train(network, text, held_out, arguments)
    network.half().save_pretrained(output)
    (output / "training.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def make_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` tokens, made from the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def build(architecture: str) -> transformers.PreTrainedModel:
    """An untrained network in float32."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=WINDOW, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **common)
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            attention_dropout=0.1,
            **common,
        )
    )


def train(
    network: transformers.PreTrainedModel, text: torch.Tensor, held_out: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, Any]:
    """AdamW with warm-up and a cosine; the weights of the best evaluation stay in the network."""
    device, steps = arguments.device, arguments.steps
    generator = np.random.default_rng(arguments.seed)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.95)
    )
    text, best, kept, started = text.to(device), math.inf, {}, time.monotonic()
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        network.train()
        starts = generator.integers(0, len(text) - WINDOW, arguments.batch)
        ids = torch.stack([text[start : start + WINDOW] for start in starts])
        with torch.autocast(device, torch.bfloat16):
            loss = network(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % arguments.every == 0 or step + 1 == steps:
            perplexity = evaluate(network, held_out, device)
            history.append({"step": step + 1, "loss": loss.item(), "perplexity": perplexity})
            print(f"step {step + 1}: loss {loss.item():.3f}, held-out perplexity {perplexity:.2f}", file=sys.stderr)
            if perplexity < best:
                best, kept = perplexity, {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
    network.load_state_dict(kept)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "architecture": arguments.architecture,
        "parameters": sum(p.numel() for p in network.parameters()),
        "perplexity": best,
        "device": name,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "history": history,
    }


@torch.no_grad()
def evaluate(network: transformers.PreTrainedModel, ids: torch.Tensor, device: str) -> float:
    """Perplexity of the first 64 windows."""
    network.eval()
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[:64].to(device)
    losses = [network(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in windows.split(16)]
    return math.exp(float(np.mean(losses)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=("gpt2", "llama"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, help="text to train on; by default fetched")
    parser.add_argument("--evaluation", type=Path, help="text that chooses the step to keep; by default Brown's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 tokens per step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
