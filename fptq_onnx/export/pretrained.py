"""Reads a Hugging Face model directory, or a GGUF file inside one, into a plain torch model."""

from __future__ import annotations

__all__ = ["Kind", "Pretrained", "load_pretrained", "save_tokenizer"]

import dataclasses
import enum
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fptq_onnx.errors import ModelError

logger = logging.getLogger(__name__)

# Everything a tokenizer, a chat template or a generation loop reads beside the weights.
_COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)


class Kind(enum.StrEnum):
    """What the exported graph computes."""

    DECODER = "decoder"
    ENCODER = "encoder"


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A loaded model, ready to be traced.

    Attributes:
        model: The transformers model in evaluation mode, on the CPU, without gradients.
        kind: Causal language model, or an encoder with any head.
        directory: The folder it came from.
        gguf_file: The GGUF file's name inside `directory`; None where the weights are safetensors or .bin.
    """

    model: Any
    kind: Kind
    directory: Path
    gguf_file: str | None

    @property
    def architecture(self) -> str:
        """The transformers class, for example "LlamaForCausalLM"."""
        return type(self.model).__name__


def load_pretrained(model_dir: str | Path, dtype: str = "float32") -> Pretrained:
    """Load a model from a local directory, never from the network.

    Args:
        model_dir: A directory with config.json and weights, or with one GGUF file (whose blocks are dequantized).
        dtype: "float32", "float16" or "bfloat16": the type of all parameters. Buffers that transformers keeps in
            float32 (rotary frequencies) stay so.

    Raises:
        ModelError: The directory is no model, holds quantized weights, or needs an architecture that the
            installed transformers does not have.
    """
    directory = Path(model_dir)
    gguf_file = _find_weights(directory)
    torch_dtype = getattr(torch, dtype)
    if gguf_file is None:
        model = _load_checkpoint(directory, torch_dtype)
    else:
        model = _load_gguf(directory, gguf_file, torch_dtype)
    model.eval().requires_grad_(False)
    return Pretrained(model, _kind(directory, model), directory, gguf_file)


def save_tokenizer(pretrained: Pretrained, out_dir: Path) -> list[str]:
    """Put the tokenizer, the configuration and the chat template beside the exported model.

    Returns:
        The names of the files written, sorted; without "tokenizer.json" where the source had no tokenizer.
    """
    source = pretrained.directory
    if pretrained.gguf_file is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=pretrained.gguf_file)
        tokenizer.save_pretrained(out_dir)
        pretrained.model.config.save_pretrained(out_dir)
    else:
        for name in _COMPANION_FILES:
            if (source / name).is_file() and (source / name).resolve() != (out_dir / name).resolve():
                shutil.copyfile(source / name, out_dir / name)
        if (source / "tokenizer_config.json").is_file() and not (source / "tokenizer.json").is_file():
            # A slow tokenizer: transformers converts it to the single file that everything else here reads.
            transformers.AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(out_dir)
    written = sorted(name for name in _COMPANION_FILES if (out_dir / name).is_file())
    if "tokenizer.json" not in written:
        logger.warning("%s: no tokenizer found, so none was put beside the exported model", source)
    return written


def _find_weights(directory: Path) -> str | None:
    """Return the GGUF file to read, or None for an ordinary checkpoint."""
    if not directory.is_dir():
        raise ModelError(str(directory), "there is no such directory", "Give a local Hugging Face model directory")
    gguf_files = sorted(path.name for path in directory.glob("*.gguf"))
    if any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin")) or not gguf_files:
        if not (directory / "config.json").is_file():
            raise ModelError(
                str(directory),
                "it has neither config.json nor a GGUF file",
                "Give the directory that holds the model's config.json and weights",
            )
        return None
    if len(gguf_files) > 1:
        raise ModelError(
            str(directory),
            f"it holds several GGUF files ({', '.join(gguf_files)})",
            "Keep one of them in the directory",
        )
    return gguf_files[0]


def _load_checkpoint(directory: Path, dtype: torch.dtype) -> Any:
    config_file = directory / "config.json"
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(config_file), f"it is not valid JSON ({error})", "Restore the file") from error
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise ModelError(
            str(config_file), f"the weights are already quantized with {method}", "Export the unquantized checkpoint"
        )
    architectures = raw.get("architectures") or []
    if not architectures:
        raise ModelError(
            str(config_file),
            'it names no "architectures"',
            'Add the class of the model, for example "architectures": ["LlamaForCausalLM"]',
        )
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise ModelError(
            str(config_file),
            f"transformers {transformers.__version__} has no {architectures[0]} (code from the directory is never run)",
            "Upgrade transformers, or export the model with its own tools",
        )
    try:
        model, info = model_class.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            str(directory), f"the model cannot be loaded ({_first_line(error)})", "Check its files"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            str(directory),
            f"the weights lack {len(missing)} parameters of {architectures[0]}, for example {missing[0]}",
            'Correct "architectures" in config.json, or complete the weights',
        )
    return model


def _load_gguf(directory: Path, gguf_file: str, dtype: torch.dtype) -> Any:
    # Not from_pretrained(gguf_file=...): that needs accelerate and leaves a model that cannot be saved again.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = directory / gguf_file
    try:
        config = transformers.AutoConfig.from_pretrained(directory, gguf_file=gguf_file)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise ModelError(
            str(path),
            f"reading GGUF needs the package gguf ({_first_line(error)})",
            "Install it with: pip install 'fptq-onnx[export]'",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(str(path), f"it cannot be loaded ({_first_line(error)})", "Check the file") from error
    keys = model.load_state_dict(read["tensors"], strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    missing = sorted(set(keys.missing_keys) - tied)
    if missing or keys.unexpected_keys:
        raise ModelError(
            str(path),
            f"its tensors do not fit {type(model).__name__}: missing {missing[:3]}, unknown {keys.unexpected_keys[:3]}",
            "Upgrade transformers, or export from the original checkpoint",
        )
    return model


def _kind(directory: Path, model: Any) -> Kind:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or name.endswith("ForConditionalGeneration"):
        raise ModelError(
            str(directory),
            f"{name} is an encoder-decoder or multimodal model",
            "Export a causal language model or a text encoder",
        )
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return Kind.DECODER
    if getattr(model.config, "is_decoder", False):
        raise ModelError(str(directory), f"{name} is a decoder without a language-model head", "Export the full model")
    return Kind.ENCODER


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
