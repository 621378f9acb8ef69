"""Decoders with random weights, in the graph that onnxruntime-genai exports: GroupQueryAttention, fused norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, ValueInfoProto, helper

from fptq_onnx.ops import DOMAIN
from gpu_bench.onnx_models import Format, ModelBuilder, linear, store
from gpu_bench.problem import Shape

__all__ = ["CONFIGS", "DecoderConfig", "write_decoder"]

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-like decoder.

    Attributes:
        positions: Rows of the rotary tables, the longest context.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int = 8192
    rope_theta: float = 500_000.0

    def with_layers(self, layers: int | None) -> DecoderConfig:
        """The same with another depth; None leaves it."""
        return self if layers is None else replace(self, layers=layers)


CONFIGS = {
    "llama-2-7b": DecoderConfig(32, 4096, 11008, 32, 32, 128, 32000, positions=4096, rope_theta=10_000.0),
    "llama-3-8b": DecoderConfig(32, 4096, 14336, 32, 8, 128, 128256),
    "smollm2-135m": DecoderConfig(30, 576, 1536, 9, 3, 64, 49152, rope_theta=100_000.0),
}


def write_decoder(path: Path, config: DecoderConfig, form: Format, generator: torch.Generator) -> Path:
    """Write a decoder whose linear layers, lm_head included, are in `form`; norms and embedding are float16.

    Inputs: input_ids, attention_mask int64, past_key_values.{i}.key/value float16 [B, kv_heads, P, head_size].
    Outputs: logits float16 [B, S, vocabulary], present.{i}.key/value.

    Args:
        path: The model's file; weights go beside it.
        config: Sizes.
        form: Format of the linear layers.
        generator: Source of the weights; its device makes them.
    """
    return _Writer(path, config, form, generator).write()


class _Writer:
    def __init__(self, path: Path, config: DecoderConfig, form: Format, generator: torch.Generator) -> None:
        self.builder = ModelBuilder(path)
        self.config, self.form, self.generator = config, form, generator

    def write(self) -> Path:
        c, builder = self.config, self.builder
        embedding = torch.randn(c.vocabulary, c.hidden, device=self.generator.device, generator=self.generator)
        builder.external("embedding", TensorProto.FLOAT16, [c.vocabulary, c.hidden], embedding.half())
        del embedding
        self._rotary_tables()
        builder.node("Gather", ["embedding", "input_ids"], ["hidden"])
        # GroupQueryAttention wants the last position of every sequence and the longest length.
        builder.node(
            "ReduceSum", ["attention_mask", builder.constant("axis_1", np.array([1]))], ["lengths"], keepdims=0
        )
        builder.node("Sub", ["lengths", builder.constant("one", np.array(1))], ["last"])
        builder.node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32)
        builder.node("Shape", ["attention_mask"], ["mask_shape"])
        builder.node("Gather", ["mask_shape", builder.constant("index_1", np.array(1))], ["total"], axis=0)
        builder.node("Cast", ["total"], ["total_length"], to=TensorProto.INT32)
        residual, normed = "hidden", self._norm("first_norm", "hidden", None)[0]
        for layer in range(c.layers):
            residual, normed = self._layer(layer, residual, normed)
        self._linear("lm_head", normed, "logits", c.hidden, c.vocabulary)
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"]),
            *self._caches("past_key_values", "P"),
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["B", "S", c.vocabulary])
        return builder.save(inputs, [logits, *self._caches("present", "T")], "decoder")

    def _caches(self, prefix: str, length: str) -> Iterator[ValueInfoProto]:
        shape = ["B", self.config.kv_heads, length, self.config.head_size]
        for layer in range(self.config.layers):
            for kind in ("key", "value"):
                yield helper.make_tensor_value_info(f"{prefix}.{layer}.{kind}", TensorProto.FLOAT16, shape)

    def _rotary_tables(self) -> None:
        c = self.config
        frequency = c.rope_theta ** -(torch.arange(0, c.head_size, 2).double() / c.head_size)
        angle = torch.outer(torch.arange(c.positions).double(), frequency)
        for name, table in (("cos_cache", angle.cos()), ("sin_cache", angle.sin())):
            self.builder.external(name, TensorProto.FLOAT16, list(table.shape), table.half())

    def _norm(self, name: str, value: str, addend: str | None) -> tuple[str, str]:
        """(normed, residual): of value, or of value + addend."""
        weight = self.builder.constant(f"{name}_weight", np.ones(self.config.hidden, np.float16))
        if self.form is Format.W4A8_FUSED:  # the name stands for the quantized activation and its scale
            if addend is None:
                outputs = [f"{name}_q", f"{name}_s"]
                self.builder.node("RMSNormDynamicQuantize", [value, weight], outputs, DOMAIN, epsilon=1e-5)
                return name, value
            outputs = [f"{name}_q", f"{name}_s", f"{name}_residual"]
            self.builder.node("SkipRMSNormDynamicQuantize", [value, addend, weight], outputs, DOMAIN, epsilon=1e-5)
            return name, f"{name}_residual"
        if addend is None:
            self.builder.node(
                "SimplifiedLayerNormalization", [value, weight], [name], axis=-1, epsilon=1e-5, stash_type=1
            )
            return name, value
        outputs = [name, "", "", f"{name}_residual"]
        self.builder.node("SkipSimplifiedLayerNormalization", [value, addend, weight], outputs, MICROSOFT, epsilon=1e-5)
        return name, f"{name}_residual"

    def _linear(self, name: str, value: str, output: str, k: int, n: int) -> None:
        shape = Shape(k, n)
        linear(
            self.builder, value, store(self.builder, name, shape, self.form, self.generator), output, shape, self.form
        )

    def _layer(self, layer: int, residual: str, normed: str) -> tuple[str, str]:
        c, at = self.config, f"layer{layer}"
        attention = c.heads * c.head_size
        self._linear(f"{at}.qkv", normed, f"{at}.qkv_out", c.hidden, attention + 2 * c.kv_heads * c.head_size)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        self.builder.node(
            "GroupQueryAttention",
            [f"{at}.qkv_out", "", "", *past, "seqlens_k", "total_length", "cos_cache", "sin_cache"],
            [f"{at}.attention", f"present.{layer}.key", f"present.{layer}.value"],
            MICROSOFT,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            do_rotary=1,
        )
        self._linear(f"{at}.o", f"{at}.attention", f"{at}.o_out", attention, c.hidden)
        normed, residual = self._norm(f"{at}.mlp_norm", residual, f"{at}.o_out")
        for name in ("gate", "up"):
            self._linear(f"{at}.{name}", normed, f"{at}.{name}_out", c.hidden, c.intermediate)
        if self.form is Format.W4A8_FUSED:
            outputs = [f"{at}.gated_q", f"{at}.gated_s"]
            self.builder.node("SiluMulDynamicQuantize", [f"{at}.gate_out", f"{at}.up_out"], outputs, DOMAIN)
        else:
            self.builder.node("Sigmoid", [f"{at}.gate_out"], [f"{at}.sigmoid"])
            self.builder.node("Mul", [f"{at}.gate_out", f"{at}.sigmoid"], [f"{at}.silu"])
            self.builder.node("Mul", [f"{at}.silu", f"{at}.up_out"], [f"{at}.gated"])
        self._linear(f"{at}.down", f"{at}.gated", f"{at}.down_out", c.intermediate, c.hidden)
        normed, residual = self._norm(f"{at}.next_norm", residual, f"{at}.down_out")
        return residual, normed
