"""Mode "operators": linear layers in an onnxruntime session, in a CUDA graph, against onnxruntime's own operators."""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_bench.onnx_models import Format, write_chain
from gpu_bench.peers import cold_copies
from gpu_bench.problem import Shape, random_activations
from gpu_bench.records import environment, write_record
from gpu_bench.sessions import BoundRun, cuda_session, environment_variable, op_library
from gpu_bench.tables import markdown_table
from gpu_bench.timing import ROUNDS, Timing, interleave

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)

CHAIN = (Shape(4096, 14336), Shape(14336, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_TOKENS = (1, 16, 64, 256, 1024, 4096)
# Format and value of ORT_FPA_INTB_GEMM, which selects MatMulNBits' CUTLASS kernels when a session is created.
PEERS = {
    "fp16 MatMul": (Format.FLOAT16, None),
    "MatMulNBits b128": (Format.NBITS_128, None),
    "MatMulNBits b32 fpA_intB": (Format.NBITS_32, "1"),
    "MatMulNBits b128 fpA_intB": (Format.NBITS_128, "1"),
    "W4A8 per-token": (Format.W4A8, None),
    "W4A8 per-token fused": (Format.W4A8_ONE_OP, None),
    "W4A8 per-token structured": (Format.W4A8_STRUCTURED, None),
    "W4A8 per-token structured fused": (Format.W4A8_STRUCTURED_ONE_OP, None),
    "W4A8 static": (Format.W4A8_STATIC, None),
}
OURS = "W4A8 per-token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument(
        "--layers",
        type=int,
        default=48,
        help="MatMuls in one chain; a session's own cost per run "
        "(about 20 us) is spread over them (default %(default)s)",
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="token counts M")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=list(PEERS),
        metavar="NAME",
        help=f"any of: {', '.join(PEERS)}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the record; returns the exit status."""
    head = environment()
    tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    sessions, unavailable = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        for index, name in enumerate(arguments.peers):
            form, switch = PEERS[name]
            copies = -(-cold_copies(int(CHAIN[0].k * CHAIN[0].n * form.weight_bytes_per_element)) // len(CHAIN))
            path = write_chain(Path(directory, f"{index}.onnx"), CHAIN, form, arguments.layers, copies, generator)
            library = op_library() if form.name.startswith("W4A8") else None
            try:
                with environment_variable("ORT_FPA_INTB_GEMM", switch):
                    sessions[name] = cuda_session(path, graph=True, library=library)
            except Exception as error:  # onnxruntime raises a dozen types of its own
                unavailable[name] = str(error).splitlines()[0]
                logger.warning("%s: no session: %s", name, unavailable[name])
            path.with_name(path.name + ".data").unlink()
        rows = [_measure(sessions, unavailable, index, m, arguments, generator) for index, m in enumerate(tokens)]
    print(_table(rows, list(sessions)))
    for name, reason in unavailable.items():
        print(f"{name}: not measured: {reason}")
    protocol = {
        "chain": [shape.label for shape in CHAIN],
        "layers": arguments.layers,
        "weights": "different ones of at least 240 MB together, reused in turn",
        "unit": "microseconds of wall clock per MatMul, session run included, median with range",
        "rounds": ROUNDS,
        "contains": "activation quantization where the format has one",
    }
    body = {"protocol": protocol, "unavailable": unavailable, "rows": rows}
    print(write_record("gpu-operators" + ("-quick" if arguments.quick else ""), head, body))
    return 1 if OURS in arguments.peers and OURS in unavailable else 0


def _measure(
    sessions: dict[str, Any],
    unavailable: dict[str, str],
    graph_id: int,
    tokens: int,
    arguments: argparse.Namespace,
    generator: torch.Generator,
) -> dict[str, Any]:
    x = random_activations(tokens, CHAIN[0].k, torch.float16, generator)
    timers, outputs = {}, {}
    for name, session in sessions.items():
        outputs[name] = torch.full((tokens, CHAIN[-1].n), float("nan"), dtype=torch.float16, device="cuda")
        try:
            # Zero is onnxruntime's default graph; ids of our own begin at 1.
            timers[name] = BoundRun(session, {"X": x}, {"Y": outputs[name]}, graph_id + 1).timer()
        except Exception as error:  # see above
            unavailable[f"{name}, M={tokens}"] = str(error).splitlines()[0]
            logger.warning("%s at M=%d: %s", name, tokens, error)
    timings = interleave(timers)
    for name in timings:
        if not bool(torch.isfinite(outputs[name]).all()):
            raise RuntimeError(f"{name} at M={tokens} left outputs unwritten or not finite")
    layers = arguments.layers
    per_layer = {
        name: Timing(t.median_us / layers, t.min_us / layers, t.max_us / layers).as_dict()
        for name, t in timings.items()
    }
    del timers
    gc.collect()
    return {"tokens": tokens, "us": per_layer}


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    headers = ["M", *names, "fp16 / W4A8", "best MatMulNBits / W4A8"]
    cells = []
    for row in rows:
        us = {name: figures["median_us"] for name, figures in row["us"].items()}
        ours = min((us[name] for name in us if name.startswith("W4A8 per-token")), default=None)
        nbits = min((us[name] for name in us if name.startswith("MatMulNBits")), default=None)
        ratios = [f"{peer / ours:.2f}" if peer and ours else "-" for peer in (us.get("fp16 MatMul"), nbits)]
        cells.append([str(row["tokens"]), *(f"{us[name]:.1f}" if name in us else "-" for name in names), *ratios])
    return markdown_table(headers, cells)
