"""Mode "models": a whole decoder, prefill and decode, in several weight formats side by side."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from cpu_bench import llama_cpp
from cpu_bench.decoder_file import head_size
from cpu_bench.peers import OPENVINO, OpenVinoDecoder, missing_package
from cpu_bench.records import write_record
from cpu_bench.timing import CLOCK, clock_for, measure
from cpu_bench.variants import VARIANTS, write_variant
from fptq_onnx import ops

__all__ = ["GenaiDecoder", "add_arguments", "run"]

DEFAULT = ["float32", "MatMulNBits b128", "dynamic int8", "W4A8", "W4A8 float scales"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument("model", type=Path, help="float32 decoder of onnxruntime-genai's builder (model.onnx)")
    parser.add_argument("--add", action="append", default=[], metavar="LABEL=PATH", help="another form of this decoder")
    parser.add_argument(
        "--variants", type=lambda text: text.split(","), default=DEFAULT, help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--openvino", action="store_true", help="also OpenVINO, where it is installed")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="GGUF",
        help=f"also llama.cpp on this file of the same decoder, where {llama_cpp.PACKAGE} is installed",
    )
    parser.add_argument("--folder", type=Path, help="where the variants are kept (default: nowhere)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt (default %(default)s)")
    parser.add_argument("--past", type=int, default=512, help="cached tokens when decoding (default %(default)s)")
    parser.add_argument("--threads", type=lambda text: [int(x) for x in text.split(",")], default=[os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="time per contender and phase")
    parser.add_argument("--profile", action="store_true", help="also show where each contender's time goes")
    parser.add_argument("--json", type=Path, help="record to write (default: a new file in tools/records)")


class GenaiDecoder:
    """A session on a decoder with GroupQueryAttention, whose cache is one buffer per layer, as in onnxruntime-genai.

    Args:
        path: The model.
        threads: Threads of the session.
        capacity: Positions of the cache.
        profile: Where onnxruntime writes a profile, or None.
    """

    def __init__(self, path: Path, threads: int, capacity: int, profile: str | None = None) -> None:
        """Create the session and the cache."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.register_custom_ops_library(str(ops.get_library_path()))
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._clock = clock_for(threads)
        self._cache = {}
        head = head_size(path)
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values"):
                shape = (1, value.shape[1], capacity, head)
                self._cache[value.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def timer(self, past: int, tokens: int) -> Callable[[], float]:
        """Return a function that runs `tokens` tokens after `past` cached ones, all logits, and returns the seconds."""
        vocabulary = next(output.shape[-1] for output in self.session.get_outputs() if output.name == "logits")
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, tokens))
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, past + tokens), np.int64))
        for name, buffer in self._cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")

        def once() -> float:
            start = self._clock()
            self.session.run_with_iobinding(binding)
            return self._clock() - start

        return once


def _phases(arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Name -> cached tokens, new tokens."""
    return {
        f"prefill {arguments.prefill}": (0, arguments.prefill),
        f"decode after {arguments.past}": (arguments.past, 1),
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the record; returns the exit status."""
    console = Console(stderr=True)
    phases = _phases(arguments)
    missing = {name: missing_package(name) for name in OPENVINO} if arguments.openvino else {}
    llama_name = f"llama.cpp {arguments.llama_cpp.stem.rsplit('.', 1)[-1]}" if arguments.llama_cpp else ""
    if llama_name:
        missing[llama_name] = None if llama_cpp.is_installed() else llama_cpp.PACKAGE
    peers: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        paths = {}
        for name in arguments.variants:
            console.print(f"writing {name}")
            paths[name] = write_variant(name, arguments.model, folder)
        paths |= {label: Path(path) for label, path in (entry.split("=", 1) for entry in arguments.add)}
        capacity = max(past + tokens for past, tokens in phases.values())
        rows = []
        for threads in arguments.threads:
            decoders: dict[str, GenaiDecoder | OpenVinoDecoder | llama_cpp.LlamaCppDecoder] = {
                name: GenaiDecoder(path, threads, capacity) for name, path in paths.items()
            }
            for name in [name for name, package in missing.items() if package is None]:
                if name == llama_name:
                    decoder = llama_cpp.LlamaCppDecoder(arguments.llama_cpp, threads, capacity)
                    decoders[name], peers[name] = decoder, decoder.features()
                else:
                    decoders[name] = OpenVinoDecoder(name, arguments.model, threads)
            for phase, (past, tokens) in phases.items():
                console.print(f"{phase}, {threads} threads")
                timers = {name: decoder.timer(past, tokens) for name, decoder in decoders.items()}
                times = measure(timers, arguments.rounds, arguments.seconds)
                speeds = {name: tokens / entry["median_ms"] * 1e3 for name, entry in times.items()}
                rows.append(
                    {"phase": phase, "tokens": tokens, "threads": threads, "times": times, "tokens_per_s": speeds}
                )
            del decoders
        content: dict[str, Any] = {
            "protocol": {
                "unit": "milliseconds per run: median, least and greatest over rounds of a round's median",
                "clock": CLOCK,
                "prefill": "all logits, empty cache",
                "decode": "one token; the cache is one buffer per layer, read and appended to in place",
                "rounds": arguments.rounds,
                "weights": "rounded to nearest: these models are for timing only",
            },
            "unavailable": {name: f"{package} is not installed" for name, package in missing.items() if package},
            "peers": peers,
            "rows": rows,
        }
        if arguments.profile:
            content["profile"] = {
                phase: {
                    name: _profile(path, arguments.threads[-1], past, tokens, capacity) for name, path in paths.items()
                }
                for phase, (past, tokens) in phases.items()
            }
    console.print(_table(rows))
    for phase, profiles in content.get("profile", {}).items():
        console.print(_profile_table(phase, profiles))
    console.print(str(write_record("cpu-models", content, arguments.json)))
    return 0


def _profile(path: Path, threads: int, past: int, tokens: int, capacity: int) -> dict[str, float]:
    """Milliseconds of each operator in one run, summed over its nodes; the median of a few runs."""
    with tempfile.TemporaryDirectory() as folder:
        decoder = GenaiDecoder(path, threads, capacity, str(Path(folder) / "profile"))
        once = decoder.timer(past, tokens)
        runs = 6
        for _ in range(runs):
            once()
        events = json.loads(Path(decoder.session.end_profiling()).read_text(encoding="utf-8"))
    totals: dict[str, list[float]] = defaultdict(list)
    nodes: dict[str, list[float]] = defaultdict(list)
    operators: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"]].append(event["dur"] / 1e3)
            operators[event["name"]] = event["args"]["op_name"] + (" (head)" if "lm_head" in event["name"] else "")
    for name, durations in nodes.items():
        totals[operators[name]].append(statistics.median(durations[1:] or durations))
    return dict(sorted(((op, sum(parts)) for op, parts in totals.items()), key=lambda item: -item[1]))


def _table(rows: list[dict[str, Any]]) -> Table:
    names = list(rows[0]["times"])
    table = Table(title="tokens per second (ratio to the first)")
    for column in ["phase", "threads", *names]:
        table.add_column(column, justify="right")
    for row in rows:
        speeds = row["tokens_per_s"]
        cells = [f"{speeds[name]:.0f} ({speeds[name] / speeds[names[0]]:.2f})" for name in names]
        table.add_row(row["phase"], str(row["threads"]), *cells)
    return table


def _profile_table(phase: str, profiles: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"{phase}: milliseconds per operator")
    operators = list(dict.fromkeys(op for profile in profiles.values() for op in profile))
    operators.sort(key=lambda op: -max(profile.get(op, 0.0) for profile in profiles.values()))
    for column in ["operator", *profiles]:
        table.add_column(column, justify="right")
    for op in operators[:16]:
        table.add_row(op, *(f"{profile[op]:.2f}" if op in profile else "-" for profile in profiles.values()))
    return table
