"""The inputs, outputs and dynamic axes of an exported graph, and the torch module that has just those."""

from __future__ import annotations

__all__ = ["Interface", "Signature", "decoder_signature", "encoder_signature"]

import dataclasses
import inspect
from typing import Any

import torch
import transformers

from fptq_onnx.errors import ModelError

# Output fields of transformers' encoder classes, in the order in which they become graph outputs.
_ENCODER_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")

# Sizes of the example that is traced. All differ from one another and from 0 and 1, which torch.export would bake in.
_BATCH, _SEQUENCE, _PAST = 2, 5, 3


@dataclasses.dataclass(frozen=True)
class Interface:
    """The graph as its caller sees it.

    Attributes:
        inputs: Graph input names, in order.
        outputs: Graph output names, in order.
        cache: (key/value heads, head size) of each cached layer; empty without a cache.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What is traced.

    Attributes:
        interface: Names of the inputs and outputs.
        module: Wraps the model; its forward takes exactly `example` and returns tensors in the interface's order.
        example: Arguments to trace with.
        dynamic_shapes: Axis names, in the structure of `example`.
    """

    interface: Interface
    module: torch.nn.Module
    example: tuple[Any, ...]
    dynamic_shapes: dict[str, Any]


class _Decoder(torch.nn.Module):
    """A causal language model without a cache."""

    def __init__(self, model: Any, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        return output.logits  # type: ignore[no-any-return]


class _CachedDecoder(torch.nn.Module):
    """A causal language model whose key/value cache is an argument and a result."""

    def __init__(self, model: Any, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(past_key_values):
            cache.update(key, value, layer)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, present


class _Encoder(torch.nn.Module):
    """An encoder, its results as a plain tuple."""

    def __init__(self, model: Any, interface: Interface) -> None:
        super().__init__()
        self.model = model
        self.interface = interface

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self.interface.inputs, inputs, strict=True)))
        return tuple(output[name] for name in self.interface.outputs)


def decoder_signature(model: Any, kv_cache: bool) -> Signature:
    """Describe a causal language model.

    Inputs are input_ids [B, S], attention_mask [B, P + S] and, where the architecture has it, position_ids [B, S],
    all int64; with a cache also past_key_values.N.key/value [B, heads, P, head size]. Outputs are logits
    [B, S, vocabulary] and present.N.key/value [B, heads, P + S, head size].
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask", *(["position_ids"] if takes_positions else [])]
    past = _PAST if kv_cache else 0
    ids = torch.arange(_BATCH * _SEQUENCE).reshape(_BATCH, _SEQUENCE) % model.config.vocab_size
    example: list[Any] = [ids, torch.ones(_BATCH, past + _SEQUENCE, dtype=torch.int64)]
    shapes: dict[str, Any] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence" if kv_cache else "sequence"},
    }
    if takes_positions:
        example.append(torch.arange(past, past + _SEQUENCE).expand(_BATCH, _SEQUENCE).contiguous())
        shapes["position_ids"] = {0: "batch", 1: "sequence"}
    if not kv_cache:
        return Signature(Interface(tuple(names), ("logits",)), _Decoder(model, takes_positions), tuple(example), shapes)

    if not takes_positions:
        example.append(None)
        shapes["position_ids"] = None
    cache_shapes = _cache_shapes(model)
    dtype = model.dtype
    example.append(
        [
            (torch.zeros(_BATCH, heads, _PAST, size, dtype=dtype), torch.zeros(_BATCH, heads, _PAST, size, dtype=dtype))
            for heads, size in cache_shapes
        ]
    )
    axes = {0: "batch", 2: "past_sequence"}
    shapes["past_key_values"] = [(axes, axes)] * len(cache_shapes)
    suffixes = [f"{layer}.{part}" for layer in range(len(cache_shapes)) for part in ("key", "value")]
    interface = Interface(
        inputs=(*names, *(f"past_key_values.{suffix}" for suffix in suffixes)),
        outputs=("logits", *(f"present.{suffix}" for suffix in suffixes)),
        cache=tuple(cache_shapes),
    )
    return Signature(interface, _CachedDecoder(model, takes_positions), tuple(example), shapes)


def encoder_signature(model: Any) -> Signature:
    """Describe an encoder: input_ids, attention_mask and, where it has segments, token_type_ids, int64 [B, S]."""
    parameters = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if "input_ids" not in parameters or "attention_mask" not in parameters:
        raise ModelError(
            type(model).__name__, "its inputs are not token ids", "Export a causal language model or a text encoder"
        )
    if "token_type_ids" in parameters and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    ids = torch.arange(_BATCH * _SEQUENCE).reshape(_BATCH, _SEQUENCE) % model.config.vocab_size
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    example = tuple(values[name] for name in names)
    with torch.no_grad():
        output = model(**dict(zip(names, example, strict=True)))
    output_names = [name for name in _ENCODER_OUTPUTS if output.get(name) is not None]
    axes = {0: "batch", 1: "sequence"}
    shapes = {"inputs": tuple(axes for _ in names)}
    interface = Interface(tuple(names), tuple(output_names))
    return Signature(interface, _Encoder(model, interface), example, shapes)


def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """Learn each layer's cache from a real call: configurations name these sizes in too many ways."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    layers = getattr(output.past_key_values, "layers", None) or []
    shapes = []
    for layer in layers:
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if key is None or value is None or key.ndim != 4 or key.shape != value.shape:
            raise ModelError(
                type(model).__name__,
                f"its cache ({type(layer).__name__}) does not consist of one key and one value per token",
                "Export without the key/value cache",
            )
        shapes.append((key.shape[1], key.shape[3]))
    if not shapes:
        raise ModelError(type(model).__name__, "it returns no key/value cache", "Export without the key/value cache")
    return shapes
