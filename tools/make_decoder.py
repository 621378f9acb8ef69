#!/usr/bin/env python3
"""Write a decoder with random weights in several weight formats, for `bench_gpu.py models`.

    python tools/make_decoder.py llama-3-8b out/ --formats fp16 nbits128 nbits32 w4a8

The graphs are those that onnxruntime-genai exports (GroupQueryAttention, fused norms, one KV cache pair per layer), so
that speed can be measured on sizes for which no checkpoint is at hand. Weights really are rounded to int4. Needs torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run from a checkout, too, where neither package is installed.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

import torch
from gpu_bench.onnx_models import Format
from gpu_bench.random_decoder import CONFIGS, write_decoder

__all__ = ["main"]

FORMATS = {
    "fp16": Format.FLOAT16,
    "nbits128": Format.NBITS_128,
    "nbits32": Format.NBITS_32,
    "w4a8": Format.W4A8,
    "w4a8structured": Format.W4A8_STRUCTURED,
    "w4a8static": Format.W4A8_STATIC,
    "w4a8fused": Format.W4A8_FUSED,
}


def main() -> int:
    """Write the models, one folder per format; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp16", "nbits128", "w4a8"])
    parser.add_argument("--layers", type=int, help="write fewer layers than the model has")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in arguments.formats:
        folder = arguments.output / name
        folder.mkdir(parents=True, exist_ok=True)
        config = CONFIGS[arguments.config].with_layers(arguments.layers)
        generator = torch.Generator(device).manual_seed(arguments.seed)
        path = write_decoder(folder / "model.onnx", config, FORMATS[name], generator)
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        print(f"{path}: {config.layers} layers, {size / 1e6:.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
