"""Mode "kernels": W4A8MatMul against onnxruntime's own matrix products, one product at a time."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cpu_bench.records import machine, write_record
from cpu_bench.timing import measure
from fptq_onnx import ops

__all__ = ["MODELS", "add_arguments", "run"]

SHAPES = "576x1536,1536x576,4096x4096,4096x11008,11008x4096"
ROWS = "1,2,4,8,16,64,128,512"
OURS = ["fptq", "fptq structured"]
PEERS = ["MatMul f32", "MatMulNBits b128", "MatMulNBits b32", "DynamicQuantizeMatMul"]
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Case:
    """One shape, number of rows and thread count."""

    k: int
    n: int
    rows: int
    threads: int


class ModelBuilder:
    """A graph X float32 [M, K] -> Y float32 [M, N]."""

    def __init__(self, k: int) -> None:
        """Start with the input."""
        self.x = ir.Value(name="X", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["M", k]))
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer."""
        tensor = ir.Tensor(array, dtype=dtype, name=name) if dtype else ir.tensor(array, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(array.shape)), const_value=tensor
        )
        self.initializers.append(value)
        return value

    def node(self, node: ir.Node) -> ir.Node:
        """Add a node, naming its outputs."""
        for i, output in enumerate(node.outputs):
            output.name = f"v{len(self.nodes)}_{i}"
        self.nodes.append(node)
        return node

    def model(self) -> bytes:
        """Serialize; the last node's first output is Y."""
        y = self.nodes[-1].outputs[0]
        y.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [self.x],
            [y],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": ops.BODY_OPSET, ops.DOMAIN: ops.VERSION, MICROSOFT: 1},
            name="bench",
        )
        return ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()


def _ours(k: int, n: int, rng: np.random.Generator, structured: bool) -> bytes:
    builder = ModelBuilder(k)
    block = min(128, k)
    groups = -(-k // block)
    scale = rng.uniform(0.5, 1.0, (groups, n)).astype(np.float32)
    if structured:
        base = rng.uniform(0.5, 1.0, (1, n)).astype(np.float16).astype(np.float32)
        scale = base * rng.integers(1, 16, (groups, n)).astype(np.float32)
    quantize = builder.node(ops.dynamic_quantize_per_token.dynamic_quantize_per_token(builder.x))
    builder.node(
        ops.w4a8_matmul.w4a8_matmul(
            *quantize.outputs,
            builder.constant("zero_point", np.array(128, np.uint8)),
            builder.constant("B", rng.integers(-8, 8, (k, n), np.int8).astype(ml_dtypes.int4), ir.DataType.INT4),
            builder.constant("b_scale", scale),
            block_size=block,
            scale_max_multiple=15 if structured else 0,
        )
    )
    return builder.model()


def _float(k: int, n: int, rng: np.random.Generator) -> bytes:
    builder = ModelBuilder(k)
    weight = builder.constant("W", rng.standard_normal((k, n), np.float32))
    builder.node(ir.node("MatMul", [builder.x, weight]))
    return builder.model()


def _matmul_nbits(k: int, n: int, rng: np.random.Generator, block: int) -> bytes:
    builder = ModelBuilder(k)
    groups = -(-k // block)
    builder.node(
        ir.node(
            "MatMulNBits",
            [
                builder.x,
                builder.constant("B", rng.integers(0, 256, (n, groups, block // 2), np.uint8)),
                builder.constant("scales", rng.uniform(0.5, 1.0, n * groups).astype(np.float32)),
            ],
            attributes={"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 4},
            domain=MICROSOFT,
        )
    )
    return builder.model()


def _dynamic_quantize(k: int, n: int, rng: np.random.Generator) -> bytes:
    builder = ModelBuilder(k)
    inputs = [
        builder.x,
        builder.constant("B", rng.integers(-127, 128, (k, n), np.int8)),
        builder.constant("b_scale", np.array(0.01, np.float32)),
        builder.constant("b_zero_point", np.array(0, np.int8)),
    ]
    builder.node(ir.node("DynamicQuantizeMatMul", inputs, domain=MICROSOFT))
    return builder.model()


MODELS: dict[str, Callable[[int, int, np.random.Generator], bytes]] = {
    "fptq": lambda k, n, rng: _ours(k, n, rng, structured=False),
    "fptq structured": lambda k, n, rng: _ours(k, n, rng, structured=True),
    "MatMul f32": _float,
    "MatMulNBits b128": lambda k, n, rng: _matmul_nbits(k, n, rng, 128),
    "MatMulNBits b32": lambda k, n, rng: _matmul_nbits(k, n, rng, 32),
    "DynamicQuantizeMatMul": _dynamic_quantize,
}


def _open(name: str, k: int, n: int, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(ops.get_library_path()))
    data = MODELS[name](k, n, np.random.default_rng(0))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _timers(
    k: int, n: int, rows: int, threads: int, sessions: dict[str, ort.InferenceSession], evict: Callable[[], None]
) -> dict[str, Callable[[], float]]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    x = np.random.default_rng(1).standard_normal((rows, k), np.float32)

    def timer(session: ort.InferenceSession) -> Callable[[], float]:
        binding = session.io_binding()
        binding.bind_cpu_input("X", x)
        binding.bind_output(session.get_outputs()[0].name)

        def once() -> float:
            evict()
            start = clock()
            session.run_with_iobinding(binding)
            return clock() - start

        return once

    return {name: timer(session) for name, session in sessions.items()}


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    for threads in arguments.threads:
        for shape in arguments.shapes:
            k, n = (int(size) for size in shape.split("x"))
            yield k, n, threads


def _unavailable(description: dict[str, Any]) -> dict[str, str]:
    if "amx_int8" in description["vector_sets"]:
        return {}
    return {"AMX kernels": "this processor has no AMX; all rows are measured without"}


def _print(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(title="time of fptq relative to each contender (below 1: fptq is faster)")
    for column in ["shape", "M", "threads", "fptq ms", "structured ms", *PEERS]:
        table.add_column(column, justify="right")
    for result in results:
        times = {name: entry["median_ms"] for name, entry in result["times"].items()}
        ratios = [
            " / ".join(f"{times[own] / times[peer]:.2f}" for own in OURS if own in times) if peer in times else "-"
            for peer in PEERS
        ]
        own = [f"{times[name]:.3f}" if name in times else "-" for name in OURS]
        table.add_row(f"{result['k']}x{result['n']}", str(result["rows"]), str(result["threads"]), *own, *ratios)
    console.print(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    numbers = lambda text: [int(item) for item in text.split(",")]  # noqa: E731
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=SHAPES.split(","), help="KxN,KxN,...")
    parser.add_argument("--rows", type=numbers, default=numbers(ROWS), help="rows of X")
    parser.add_argument("--threads", type=numbers, default=sorted({1, os.cpu_count() or 1}), help="intra-op threads")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="4096x4096 with 1, 8, 64 and 512 rows only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time per contender and case")
    parser.add_argument("--cold", action="store_true", help="fill the caches with other data before every call")
    parser.add_argument("--json", type=Path, help="record to write (default: a new file in tools/records)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the record; returns the exit status."""
    if arguments.quick:
        arguments.shapes, arguments.rows = ["4096x4096"], [1, 8, 64, 512]
    other_data = np.zeros(96 << 20, np.uint8)
    evict: Callable[[], None] = (lambda: other_data.__iadd__(1)) if arguments.cold else (lambda: None)  # type: ignore[return-value]
    console = Console(stderr=True)
    results: list[dict[str, Any]] = []
    cases = list(_cases(arguments))
    with Progress(console=console) as progress:
        task = progress.add_task("cases", total=len(cases) * len(arguments.rows))
        for k, n, threads in cases:
            sessions = {name: _open(name, k, n, threads) for name in arguments.contenders}
            for rows in arguments.rows:
                times = measure(_timers(k, n, rows, threads, sessions, evict), arguments.rounds, arguments.seconds)
                results.append({"k": k, "n": n, "rows": rows, "threads": threads, "times": times})
                progress.advance(task)
    content = {
        "protocol": {
            "unit": "milliseconds: median, least and greatest over rounds of a round's median",
            "clock": "processor time of the calling thread with one thread, wall time with more",
            "rounds": arguments.rounds,
            "caches": "filled with other data before every call" if arguments.cold else "warm",
            "fptq": "DynamicQuantizePerToken + W4A8MatMul, float32 in and out, groups of min(128, K)",
        },
        "unavailable": _unavailable(machine()),
        "rows": results,
    }
    write_record("cpu-kernels", content, arguments.json)
    _print(Console(width=180), results)
    return 0
