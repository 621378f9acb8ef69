"""Feeds for one step of a decoder with a KV cache, in fixed buffers so that a CUDA graph can replay it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnxruntime as ort
import torch

__all__ = ["Decoder", "DecoderStep"]

TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class DecoderStep:
    """Bound tensors of one run: `tokens` new tokens per sequence after `past` cached ones."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


class Decoder:
    """An ONNX decoder: input_ids, attention_mask, position_ids, past_key_values.* to logits, present.*.

    Graphs with GroupQueryAttention share one buffer between past and present; others (cache by Concat) read
    past [B, heads, P, size] and write present [B, heads, P + T, size].
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Read the attention kind off the graph; tensors' names are read per session."""
        self.shared_cache = any(node.op_type == "GroupQueryAttention" for node in graph.node)

    def step(
        self, session: ort.InferenceSession, batch: int, past: int, tokens: int, device: str, generator: torch.Generator
    ) -> DecoderStep:
        """Make the tensors of one run.

        Args:
            session: The model's session.
            batch: Sequences.
            past: Cached tokens per sequence; the cache holds random values.
            tokens: New tokens per sequence.
            device: Where the tensors live.
            generator: Source of the token ids, on the CPU.

        Raises:
            ValueError: The model has an input that is none of the known ones, or outputs of unknown size.
        """
        total = past + tokens
        outputs = {out.name: out for out in session.get_outputs()}
        vocabulary = _fixed(outputs["logits"].shape, -1, "logits")
        inputs: dict[str, torch.Tensor] = {}
        made: dict[str, torch.Tensor] = {}
        for given in session.get_inputs():
            name, dtype = given.name, TORCH_TYPES[given.type]
            if name == "input_ids":
                tensor = torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(dtype)
            elif name == "attention_mask":
                tensor = torch.ones(batch, total, dtype=dtype)
            elif name == "position_ids":
                tensor = torch.arange(past, total, dtype=dtype).repeat(batch, 1)
            elif name.startswith("past_key_values"):
                heads, size = _fixed(given.shape, 1, name), _fixed(given.shape, 3, name)
                length = total if self.shared_cache else past
                tensor = torch.randn(batch, heads, length, size, generator=generator).mul_(0.5).to(dtype)
            else:
                raise ValueError(f"do not know what to feed to input '{name}' {given.shape}")
            inputs[name] = tensor.to(device).contiguous()
        for name, out in outputs.items():
            past_name = name.replace("present", "past_key_values", 1)
            if name == "logits":
                made[name] = torch.empty(batch, tokens, vocabulary, dtype=TORCH_TYPES[out.type], device=device)
            elif past_name in inputs and self.shared_cache:
                made[name] = inputs[past_name]
            elif past_name in inputs:
                shape = list(inputs[past_name].shape)
                shape[2] = total
                made[name] = torch.empty(shape, dtype=TORCH_TYPES[out.type], device=device)
            else:
                raise ValueError(f"do not know the size of output '{name}' {out.shape}")
        return DecoderStep(inputs, made)


def _fixed(shape: Sequence[object], axis: int, name: str) -> int:
    size = shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"dimension {axis} of '{name}' is not fixed: {list(shape)}")
    return size
