"""Time W4A8MatMul on the CPU against onnxruntime's own matrix products.

All contenders of a case run in one process, interleaved, and are reported as ratios of medians: absolute times depend
on the machine and its neighbours. With one thread the clock is that thread's processor time, else wall time. Ours is
DynamicQuantizePerToken + W4A8MatMul, float32 in and out, once with free float scales and once with integer-structured
ones. With --cold the caches are filled with other data before every call.

    python tools/bench_cpu.py
    python tools/bench_cpu.py --shapes 4096x4096 --rows 1,64 --threads 1 --cold
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
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

from fptq_onnx import ops

RECORDS = Path(__file__).parent / "records"
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


def measure(timers: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Interleave the contenders.

    Args:
        timers: For each contender a function that runs it once and returns its seconds.
        rounds: Rounds; each contender runs in each.
        seconds: Time for each contender in all rounds together, at least one call per round.

    Returns:
        For each contender the median over rounds of the round's median, and the fastest and slowest round, in ms.
    """
    calls = {name: max(1, int(seconds / rounds / min(timer() for _ in range(3)))) for name, timer in timers.items()}
    rounds_of: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            rounds_of[name].append(statistics.median(timer() for _ in range(min(calls[name], 200))) * 1e3)
    return {
        name: {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
        for name, values in rounds_of.items()
    }


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    for threads in arguments.threads:
        for shape in arguments.shapes:
            k, n = (int(size) for size in shape.split("x"))
            yield k, n, threads


def machine() -> dict[str, Any]:
    """Describe the processor, its vector sets and the versions in use."""
    flags: set[str] = set()
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{fields.get('model name', model)} family {fields.get('cpu family')} model {fields.get('model')}"
        flags = set(fields.get("flags", "").split())
    wanted = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "vector_sets": [flag for flag in wanted if flag in flags],
        "kernels": os.environ.get("FPTQ_CPU_ISA", "chosen by the library"),
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "fptq_ops": ops.library_info().version,
        },
    }


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _unavailable(description: dict[str, Any]) -> dict[str, str]:
    if "amx_int8" in description["vector_sets"]:
        return {}
    return {"AMX kernels": "this processor has no AMX; all rows are measured without"}


def _record_path(created: str, cpu: str) -> Path:
    """The name that tools/records/README.md asks for; no record is replaced."""
    stem = f"{created[:10]}-{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}-cpu-kernels"
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(path for name in names if not (path := RECORDS / f"{name}.json").exists())


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


def main() -> None:
    """Run the benchmark; see the module docstring."""
    numbers = lambda text: [int(item) for item in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=SHAPES.split(","), help="KxN,KxN,...")
    parser.add_argument("--rows", type=numbers, default=numbers(ROWS), help="rows of X")
    parser.add_argument("--threads", type=numbers, default=sorted({1, os.cpu_count() or 1}), help="intra-op threads")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time per contender and case")
    parser.add_argument("--cold", action="store_true", help="fill the caches with other data before every call")
    parser.add_argument("--json", type=Path, help="record to write (default: a new file in tools/records)")
    arguments = parser.parse_args()

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
    description = machine()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {
        "kind": "cpu-kernels",
        "created": created,
        "commit": _commit(),
        "command": " ".join(["python", "tools/bench_cpu.py", *sys.argv[1:]]),
        "machine": description,
        "protocol": {
            "unit": "milliseconds: median, least and greatest over rounds of a round's median",
            "clock": "processor time of the calling thread with one thread, wall time with more",
            "rounds": arguments.rounds,
            "caches": "filled with other data before every call" if arguments.cold else "warm",
            "fptq": "DynamicQuantizePerToken + W4A8MatMul, float32 in and out, groups of min(128, K)",
        },
        "unavailable": _unavailable(description),
        "rows": results,
    }
    path = arguments.json or _record_path(created, description["cpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _print(Console(width=180), results)


if __name__ == "__main__":
    main()
