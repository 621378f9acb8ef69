"""Mode "models": whole ONNX decoders through onnxruntime, prefill and decode, side by side."""

from __future__ import annotations

import argparse
import gc
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from gpu_bench.decoder import Decoder
from gpu_bench.records import environment, write_record
from gpu_bench.sessions import BoundRun, cuda_session, environment_variable, op_library, placement
from gpu_bench.tables import markdown_table
from gpu_bench.timing import ROUNDS, interleave

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)

BATCHES = (1, 4, 16, 64)
# Logits beyond this would measure the vocabulary, not the model.
MAX_PREFILL_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="LABEL=PATH",
        help="ONNX models of one network; '@fpA_intB' at the end "
        "of a label creates its session with ORT_FPA_INTB_GEMM=1",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--prefill-batches", type=int, nargs="+", help="batches with a prompt (default: all of them)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt (default %(default)s)")
    parser.add_argument("--past", type=int, default=512, help="cached tokens when decoding (default %(default)s)")
    parser.add_argument("--network", default="", help="what the models are, for the record and its table")
    parser.add_argument("--no-graph", action="store_true", help="decode without CUDA graphs")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the record; returns the exit status."""
    head = environment()
    models = dict(entry.split("=", 1) for entry in arguments.models)
    sessions: dict[str, Any] = {}
    decoders: dict[str, Decoder] = {}
    facts: dict[str, dict[str, Any]] = {}
    for label, text in models.items():
        graph = onnx.load(text, load_external_data=False).graph
        decoders[label] = Decoder(graph)
        before = torch.cuda.mem_get_info()[0]
        library = op_library() if any(node.domain == "fptq" for node in graph.node) else None
        with environment_variable("ORT_FPA_INTB_GEMM", "1" if label.endswith("@fpA_intB") else None):
            sessions[label], captures = _session(Path(text), library, not arguments.no_graph)
        counts = Counter(placement(sessions[label]))
        facts[label] = {
            "file": Path(text).name,
            "cuda_graph": captures,
            "device_mb": round((before - torch.cuda.mem_get_info()[0]) / 1e6, 1),
            "not_on_cuda": {
                op: count for (op, provider), count in sorted(counts.items()) if provider != "CUDAExecutionProvider"
            },
            "memcpy_nodes": sum(count for (op, _), count in counts.items() if op.startswith("Memcpy")),
        }
    rows = []
    for graph_id, batch in enumerate(arguments.batches):
        for phase in ("prefill", "decode"):
            if phase == "prefill" and batch not in (arguments.prefill_batches or arguments.batches):
                continue
            rows += _measure(phase, batch, graph_id, sessions, decoders, facts, arguments)
    print(_table(rows, list(models)))
    for label, fact in facts.items():
        print(f"{label}: {fact}")
    protocol = {
        "unit": "tokens per second of wall clock, all logits computed, IO binding; median with range",
        "network": arguments.network,
        "prefill_tokens": arguments.prefill,
        "past_tokens": arguments.past,
        "memory": "device_mb: taken when the session was created, arena extended as requested",
        "rounds": ROUNDS,
    }
    print(write_record("gpu-models", head, {"protocol": protocol, "models": facts, "rows": rows}))
    return 0


def _session(path: Path, library: str | None, graph: bool) -> tuple[ort.InferenceSession, bool]:
    """One session serves prefill and decode; graph capture is refused to a model with compute nodes on the CPU."""
    config = {"session.record_ep_graph_assignment_info": "1"}
    # The default strategy doubles the arena: its size would tell nothing about the weights.
    arena = {"arena_extend_strategy": "kSameAsRequested"}
    if graph:
        try:
            return cuda_session(path, graph=True, library=library, config=config, provider_options=arena), True
        except Exception as error:  # onnxruntime raises a dozen types of its own
            logger.warning("%s: no CUDA graph: %s", path, str(error).splitlines()[0])
    return cuda_session(path, library=library, config=config, provider_options=arena), False


def _measure(
    phase: str,
    batch: int,
    graph_id: int,
    sessions: dict[str, Any],
    decoders: dict[str, Decoder],
    facts: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    past, tokens = (0, arguments.prefill) if phase == "prefill" else (arguments.past, 1)
    if batch * tokens > MAX_PREFILL_TOKENS:
        tokens = MAX_PREFILL_TOKENS // batch
    generator = torch.Generator().manual_seed(arguments.seed)
    # -1 opts a run out of capture: prompts differ in length.
    captured = graph_id + 1 if phase == "decode" else -1
    annotation = {label: captured if fact["cuda_graph"] else None for label, fact in facts.items()}
    timers, failures = {}, {}
    for label, session in sessions.items():
        try:
            step = decoders[label].step(session, batch, past, tokens, "cuda", generator)
            timer = BoundRun(session, step.inputs, step.outputs, annotation[label]).timer()
            if not bool(torch.isfinite(step.outputs["logits"]).all()):
                raise RuntimeError("logits are not finite")
            timers[label] = timer
        except Exception as error:  # onnxruntime raises a dozen types of its own
            failures[label] = str(error).splitlines()[0]
            logger.warning("%s %s batch %d: %s", label, phase, batch, error)
    rate = {
        label: {
            "median": batch * tokens * 1e6 / timing.median_us,
            "min": batch * tokens * 1e6 / timing.max_us,
            "max": batch * tokens * 1e6 / timing.min_us,
        }
        for label, timing in interleave(timers).items()
    }
    del timers
    gc.collect()
    torch.cuda.empty_cache()
    rounded = {label: {key: round(value, 2) for key, value in figures.items()} for label, figures in rate.items()}
    return [
        {"phase": phase, "batch": batch, "tokens": tokens, "past": past, "tokens_per_s": rounded, "failures": failures}
    ]


def _table(rows: list[dict[str, Any]], labels: list[str]) -> str:
    cells = []
    for row in rows:
        rates = row["tokens_per_s"]
        cells.append(
            [
                f"{row['phase']} {row['batch']} x {row['tokens']}",
                *(f"{rates[label]['median']:.0f}" if label in rates else "failed" for label in labels),
            ]
        )
    return markdown_table(["tokens/s", *labels], cells)
