#!/usr/bin/env python3
"""Benchmark the CUDA kernels, the operators inside onnxruntime, and whole models, against their alternatives.

    python tools/bench_gpu.py kernels --library build/.../libfptq_kernels.so
    python tools/bench_gpu.py operators
    python tools/bench_gpu.py models fp16=model_fp16/model.onnx W4A8=model_w4a8/model.onnx

Peers are interleaved round-robin in one process, five rounds, median with range; weights are random, really quantized
and cold (240 MB of different ones in turn); results are checked in the same run. Each mode prints a table and writes a
JSON record to tools/records/. Needs an NVIDIA GPU and torch with CUDA; "operators" and "models" need onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path

# Run from a checkout, too, where neither package is installed.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

MODES = {
    "kernels": "the CUDA kernels through their C interface",
    "operators": "linear layers in an onnxruntime session",
    "models": "whole ONNX decoders",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = top.add_subparsers(dest="mode", required=True)
    for mode, summary in MODES.items():
        sub = modes.add_parser(mode, help=summary, description=summary)
        sub.add_argument("--quick", action="store_true", help="the sizes that matter most, in a minute or two")
        sub.add_argument("--seed", type=int, default=1)
        importlib.import_module(f"gpu_bench.{mode}").add_arguments(sub)
    return top


def main() -> int:
    """Run one mode; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = parser().parse_args()
    import torch

    if not torch.cuda.is_available():
        print("bench_gpu: this torch sees no NVIDIA GPU; nothing was measured", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"gpu_bench.{arguments.mode}").run(arguments))


if __name__ == "__main__":
    sys.exit(main())
