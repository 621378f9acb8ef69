"""Tiny random transformers in every graph family that the converter reads, built once and kept in a cache.

All families of one architecture hold the same weights, so plans and outputs can be compared across them. Sizes are
awkward on purpose: no K is a multiple of 32, one is 8 over a group of 128, the number of heads times their size is not
the hidden size, and the vocabulary is odd.

Some channels are outliers, made without changing what the model computes (a producer is scaled up and its reader down):
with the paper's thresholds 15 and 150 layers fall in all three ranges, see `OUTLIERS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from model_cache import EXPORT_SOURCES, cached, digest

HIDDEN, FEED_FORWARD, BLOCKS, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 72, 136, 3, 4, 2, 16, 323

# Causal language models come in these families; encoders in "dynamo" only.
DYNAMO, DYNAMO_KV, DYNAMO_FP16 = "dynamo", "dynamo-kv", "dynamo-kv-fp16"
GENAI_FP32, GENAI_FP16 = "genai-fp32", "genai-fp16"

LLAMA_FAMILIES = (DYNAMO, DYNAMO_KV, GENAI_FP32, GENAI_FP16)

# (architecture, family) of every model here.
ALL_MODELS = (
    *(("llama", family) for family in (*LLAMA_FAMILIES, DYNAMO_FP16)),
    *(("llama-untied", family) for family in LLAMA_FAMILIES),
    *(("qwen2", family) for family in LLAMA_FAMILIES),
    ("gpt2", DYNAMO),
    ("gpt2", DYNAMO_KV),
    ("bert", DYNAMO),
    ("bert-classifier", DYNAMO),
)

# Gain of one channel of the inputs of these layers (Llama and Qwen2): what is not listed stays below 15.
OUTLIERS = {
    "block.0.down": 200.0,
    "block.1.qkv": 16.0,
    "block.1.o": 20.0,
    "block.1.gate_up": 25.0,
    "block.2.down": 12.0,
}

_SENTENCES = (
    "The old mill stood by the river, and nobody had opened its doors for thirty years.",
    "She counted the coins twice before she paid for the bread and the two red apples.",
    "A committee of nine members will report to the council on the first Monday in March.",
    "When the rain stopped at last, the children ran down to the harbour to see the ships.",
    "Measured over many trials, the error of the second method was smaller than that of the first.",
)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """One built model.

    Attributes:
        path: The ONNX file; tokenizer.json and config.json lie beside it.
        architecture: "llama", "llama-untied", "qwen2", "gpt2", "bert" or "bert-classifier".
        family: "dynamo", "dynamo-kv", "dynamo-kv-fp16", "genai-fp32" or "genai-fp16".
        checkpoint: The Hugging Face directory it was built from.
        vocab_size: Number of rows of the embedding.
        blocks: Number of decoder or encoder blocks.
        kv_heads: Key/value heads in the cache.
        head_size: Channels of one head.
        has_cache: Whether the graph has past_key_values inputs.
        is_decoder: Whether it is a causal language model.
    """

    path: Path
    architecture: str
    family: str
    checkpoint: Path
    vocab_size: int = VOCABULARY
    blocks: int = BLOCKS
    kv_heads: int = KV_HEADS
    head_size: int = HEAD_SIZE

    @property
    def has_cache(self) -> bool:
        return self.family != DYNAMO

    @property
    def is_decoder(self) -> bool:
        return not self.architecture.startswith("bert")

    @property
    def dtype(self) -> str:
        """Type of the weights and of the cache."""
        return "float16" if self.family.endswith("fp16") else "float32"

    @property
    def tokenizer(self) -> Path:
        return self.path.with_name("tokenizer.json")

    def token_ids(self, batch: int = 2, length: int = 12, seed: int = 0) -> np.ndarray:
        """Random tokens, int64 [batch, length]."""
        return np.random.default_rng(seed).integers(0, self.vocab_size, (batch, length), dtype=np.int64)

    def feeds(self, token_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Everything a session needs to run `token_ids` [B, S] from an empty cache."""
        batch, length = token_ids.shape
        feeds = {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}
        if not self.is_decoder:
            return feeds | {"token_type_ids": np.zeros_like(token_ids)}
        if not self.family.startswith("genai"):  # there GroupQueryAttention counts positions itself
            feeds["position_ids"] = np.broadcast_to(np.arange(length), token_ids.shape).copy()
        if self.has_cache:
            empty = np.zeros((batch, self.kv_heads, 0, self.head_size), dtype=self.dtype)
            for block in range(self.blocks):
                feeds |= {f"past_key_values.{block}.key": empty, f"past_key_values.{block}.value": empty}
        return feeds

    def run(self, token_ids: np.ndarray, path: Path | None = None) -> np.ndarray:
        """Logits of the model, or of another file with the same inputs, as float32."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path or self.path, options, providers=["CPUExecutionProvider"])
        return session.run(["logits"], self.feeds(token_ids))[0].astype(np.float32)


@functools.cache
def model(architecture: str, family: str) -> TinyModel:
    """Build a model, or find it in the cache."""
    if (architecture, family) not in ALL_MODELS:
        raise ValueError(f"no model {architecture!r} in family {family!r}")
    folder = cached(f"families/{_key()}/{architecture}/{family}", lambda target: _build(architecture, family, target))
    untouched = {"kv_heads": HEADS, "head_size": HIDDEN // HEADS} if architecture not in _ROTARY else {}
    return TinyModel(folder / "model.onnx", architecture, family, checkpoint(architecture), **untouched)


@functools.cache
def checkpoint(architecture: str) -> Path:
    """Hugging Face directory (config.json, model.safetensors, tokenizer.json) of an architecture."""
    return cached(f"families/{_key()}/{architecture}/checkpoint", lambda target: _save_checkpoint(architecture, target))


def build_genai(checkpoint_dir: Path, target: Path, precision: str, provider: str) -> None:
    """Run onnxruntime-genai's model builder, offline.

    Args:
        checkpoint_dir: Hugging Face directory.
        target: Folder for model.onnx, genai_config.json and the tokenizer.
        precision: "fp32" or "fp16".
        provider: "cpu" or "cuda"; decides the operators, nothing needs to be installed for it.
    """
    from onnxruntime_genai.models import builder

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        arguments = ("", str(checkpoint_dir), str(target), precision, provider, cache)
        options = builder.parse_extra_options(*arguments, ["hf_token=false"])
        builder.create_model(*arguments, **options)


@functools.cache
def _key() -> str:
    return digest((Path(__file__), *EXPORT_SOURCES))


def _build(architecture: str, family: str, target: Path) -> None:
    source = checkpoint(architecture)
    if family.startswith("genai"):
        fp32 = family == GENAI_FP32
        build_genai(source, target, "fp32" if fp32 else "fp16", "cpu" if fp32 else "cuda")
    else:
        from fptq_onnx.export import export_model

        dtype = "float16" if family.endswith("fp16") else "float32"
        export_model(source, target, kv_cache=family != DYNAMO, dtype=dtype)


def _save_checkpoint(architecture: str, target: Path) -> None:
    import torch

    torch.manual_seed(0)
    built = _ARCHITECTURES[architecture]().eval()
    _randomize(built)
    if architecture in _ROTARY:
        _add_outliers(built)
    built.save_pretrained(target)
    _train_tokenizer().save_pretrained(target)


def _llama(tied: bool) -> Any:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_ROTARY_SIZES, tie_word_embeddings=tied))


def _qwen2() -> Any:
    import transformers

    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_ROTARY_SIZES, tie_word_embeddings=True))


def _gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_inner=FEED_FORWARD, n_layer=BLOCKS, n_head=HEADS, n_positions=256, vocab_size=VOCABULARY
    )
    return transformers.GPT2LMHeadModel(config)


def _bert(head: str) -> Any:
    import transformers

    config = transformers.BertConfig(
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        vocab_size=VOCABULARY,
    )
    return getattr(transformers, head)(config)


_ROTARY_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_ROTARY = ("llama", "llama-untied", "qwen2")
_ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(tied=True),
    "llama-untied": lambda: _llama(tied=False),
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "bert": lambda: _bert("BertForMaskedLM"),
    "bert-classifier": lambda: _bert("BertForSequenceClassification"),
}


def _randomize(built: Any) -> None:
    """Give every parameter a size as in a trained model; equal parameters would be merged by the exporter."""
    import torch

    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name.lower() or "ln_" in name:
                parameter.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                # torch's Linear is [N, K], GPT-2's Conv1D [K, N].
                k = parameter.shape[0] if "c_" in name else parameter.shape[1]
                parameter.copy_(noise / k**0.5)


def _add_outliers(built: Any) -> None:
    """Scale one input channel of some layers up where it is made and down where it is read."""
    import torch

    blocks = built.model.layers
    with torch.no_grad():
        for label, gain in OUTLIERS.items():
            _, index, role = label.split(".")
            block = blocks[int(index)]
            attention, mlp = block.self_attn, block.mlp
            channel = 7
            if role == "qkv":
                block.input_layernorm.weight[channel] *= gain
                readers = [attention.q_proj, attention.k_proj, attention.v_proj]
                channels = [channel]
            elif role == "gate_up":
                block.post_attention_layernorm.weight[channel] *= gain
                readers, channels = [mlp.gate_proj, mlp.up_proj], [channel]
            elif role == "down":
                mlp.up_proj.weight[channel] *= gain
                readers, channels = [mlp.down_proj], [channel]
            else:
                # One value channel is read once per query head of its key/value head.
                attention.v_proj.weight[channel] *= gain
                if attention.v_proj.bias is not None:
                    attention.v_proj.bias[channel] *= gain
                readers = [attention.o_proj]
                channels = [head * HEAD_SIZE + channel for head in range(HEADS // KV_HEADS)]
            for reader in readers:
                reader.weight[:, channels] /= gain


def _train_tokenizer() -> Any:
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
