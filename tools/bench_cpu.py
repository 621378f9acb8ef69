#!/usr/bin/env python3
"""Benchmark the CPU kernels, whole decoders and the memory of a session against their alternatives.

    python tools/bench_cpu.py kernels
    python tools/bench_cpu.py kernels --shapes 4096x4096 --rows 1,64 --threads 1 --cold
    python tools/bench_cpu.py kernels --quick                       # the shape that matters most, in two minutes
    python tools/bench_cpu.py models genai-fp32/model.onnx --profile
    python tools/bench_cpu.py memory

All contenders of a case run in one process, interleaved, and are reported as ratios of medians: absolute times depend
on the machine and its neighbours. With one thread the clock is processor time, which does not count what else the
machine does, else wall time. Ours is DynamicQuantizePerToken + W4A8MatMul, float32 in and out, once with free float
scales and once with integer-structured ones. Each mode prints a table and writes a JSON record to tools/records/.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# Run from a checkout, too, where the package is not installed.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

MODES = {
    "kernels": "one matrix product at a time",
    "models": "a whole decoder, prefill and decode",
    "memory": "what a session of 64 layers of 4096x4096 holds",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = top.add_subparsers(dest="mode", required=True)
    for mode, summary in MODES.items():
        sub = modes.add_parser(mode, help=summary, description=summary)
        importlib.import_module(f"cpu_bench.{mode}").add_arguments(sub)
    return top


def main() -> int:
    """Run one mode; returns the exit status."""
    arguments = parser().parse_args()
    return int(importlib.import_module(f"cpu_bench.{arguments.mode}").run(arguments))


if __name__ == "__main__":
    sys.exit(main())
