#!/usr/bin/env python3
"""Random nodes of the op library in real onnxruntime sessions: each is refused with an error or runs, none may crash.

    python tests/hostile/fuzz_sessions.py [CASES] [--seed N] [--sanitized LIBRARY]

The cases run in a process of their own, which names the one it is at; if it dies, that case is printed with the command
that repeats it, and the exit status is 1. With a library built with AddressSanitizer the process preloads its runtime.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["OUTCOMES", "fuzz", "model", "run_case"]

OUTCOMES = ("refused at creation", "refused at call", "ran")

T = "T"  # float32, float16 or bfloat16
# Inputs by name and type, of ops that are as in their schemas in custom_ops/src/common.
_MATMUL = [("A", TensorProto.UINT8), ("a_scale", TensorProto.FLOAT), ("a_zero_point", TensorProto.UINT8)]
OPS: dict[str, tuple[list[tuple[str, Any]], int]] = {
    "W4A8MatMul": ([*_MATMUL, ("B", TensorProto.INT4), ("b_scale", T)], 1),
    "DynamicQuantizeW4A8MatMul": ([("X", T), ("B", TensorProto.INT4), ("b_scale", T)], 1),
    "W8A8MatMul": ([*_MATMUL, ("B", TensorProto.INT8), ("b_scale", T)], 1),
    "DynamicQuantizePerToken": ([("X", T)], 2),
    "RMSNormQuantize": ([("X", T), ("weight", T), ("s", TensorProto.FLOAT), ("z", TensorProto.UINT8)], 1),
    "SkipRMSNormDynamicQuantize": ([("X", T), ("skip", T), ("weight", T)], 3),
    "PackedRotaryGroupQueryAttention": (
        [
            *[(name, TensorProto.FLOAT) for name in ("qkv", "past_key", "past_value")],
            *[(name, TensorProto.INT32) for name in ("seqlens_k", "total_sequence_length")],
            *[(name, TensorProto.FLOAT) for name in ("cos_cache", "sin_cache")],
        ],
        3,
    ),
    "SiluMulQuantize": ([("gate", T), ("up", T), ("s", TensorProto.FLOAT), ("z", TensorProto.UINT8)], 1),
}
# Of the attention op, for 4 query heads on 2 key/value heads; any length from 1 to 9 is sound.
_ATTENTION: dict[str, list[int]] = {
    "qkv": [1, 1, 128],
    "past_key": [1, 2, 8, 16],
    "past_value": [1, 2, 8, 16],
    "seqlens_k": [1],
    "total_sequence_length": [],
    "cos_cache": [9, 8],
    "sin_cache": [9, 8],
}
_ATTENTION_ATTRIBUTES = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "rotary_interleaved": 0}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPES = (*_FLOATS, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT4, TensorProto.INT64, TensorProto.STRING)
_DIMENSIONS = (0, 1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65)
_DECLARED = (*_DIMENSIONS, -1, -7, 2**31, 2**40, 2**62, 2**63 - 1, "n", "")
_NUMBERS = (0, 1, -1, 2, 8, 15, 16, 17, 32, 64, 65, 2**31, 2**62, -(2**63), 2**63 - 1)


def model(rng: random.Random) -> tuple[bytes, dict[str, list[int]], dict[str, int]]:
    """A serialized model of one node; the true shapes and the types of what is to be fed."""
    op = rng.choice(list(OPS))
    operands, outputs = OPS[op]
    kind = rng.choice(_FLOATS)
    rows = [rng.choice((0, 1, 2, 3)) for _ in range(rng.randrange(3))]
    k, n = rng.choice(_DIMENSIONS[1:]), rng.choice(_DIMENSIONS[1:])
    block = min(k, rng.choice((1, 8, 16, 32, k)))
    shapes: dict[str, list[int]] = {
        "a_scale": rng.choice(([], [1], [*rows, 1])),
        "B": [k, n],
        "b_scale": [-(-k // block), n] if op.endswith("W4A8MatMul") else [n],
        "weight": [k],
        **_ATTENTION,
        **dict.fromkeys(("a_zero_point", "s", "z"), rng.choice(([], [1]))),
    }
    attributes: dict[str, Any] = {"block_size": block, "scale_max_multiple": rng.choice((0, 1, 15))}
    attributes = attributes if op.endswith("W4A8MatMul") else {"epsilon": 1e-5} if "Norm" in op else {}
    attributes = dict(_ATTENTION_ATTRIBUTES) if "Attention" in op else attributes
    constant = {"B", "b_scale", "weight"} | ({"a_zero_point"} if rng.random() < 0.7 else set())
    types = {name: kind if dtype == T else dtype for name, dtype in operands}
    true = {name: shapes.get(name, [*rows, k]) for name, _ in operands}
    declared: dict[str, Any] = {name: rng.choice((shape, None)) for name, shape in true.items()}
    names = [name for name, _ in operands]
    out_names = [f"y{i}" for i in range(outputs)]

    for _ in range(rng.choice((0, 1, 1, 2, 3))):  # spoil it
        name = rng.choice(list(types))
        what = rng.randrange(10)
        if what == 0:
            types[name] = rng.choice(_TYPES)
        elif what == 1:
            true[name] = [rng.choice(_DIMENSIONS) for _ in range(rng.randrange(5))]
        elif what == 2:
            declared[name] = [rng.choice(_DECLARED) for _ in range(rng.randrange(5))]
        elif what == 3:
            constant ^= {name}
        elif what == 4 and attributes:
            attributes[rng.choice(list(attributes))] = rng.choice((*_NUMBERS, 1.5, "32", [32], [1.0]))
        elif what == 5 and attributes:
            del attributes[rng.choice(list(attributes))]
        elif what == 6:
            names[rng.randrange(len(names))] = rng.choice(("", rng.choice(list(types))))
        elif what == 7:
            del names[rng.randrange(len(names)) :]
        elif what == 8:
            out_names = rng.choice((out_names[:-1], [*out_names, "more"], ["", *out_names[1:]]))
        else:
            attributes["colour"] = rng.choice((1, "red"))
        names = names or ["A"]

    data = np.random.default_rng(rng.getrandbits(32))
    node = helper.make_node(op, names, out_names, domain="fptq", name=rng.choice(("node", "", "%s%n", "a\nb")))
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    initializers = [_tensor(name, types[name], true[name], data) for name in types if name in constant]
    inputs = [
        helper.make_tensor_value_info(name, types[name], declared[name])
        for name in types
        if name not in constant or rng.random() < 0.05
    ]
    results = [onnx.ValueInfoProto(name=name) for name in out_names if name]
    nodes = [node]
    if rng.random() < 0.1:  # as a branch of an If: operands of the outer graph
        inner = helper.make_graph([node], "branch", [], results)
        nodes = [
            helper.make_node("If", ["yes"], [value.name for value in results], then_branch=inner, else_branch=inner)
        ]
        initializers.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    graph = helper.make_graph(nodes, "fuzz", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fptq", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    fed = {name: true[name] for name in types if name not in constant}
    return proto.SerializeToString(), fed, types


def _tensor(name: str, dtype: int, shape: list[int], data: np.random.Generator) -> onnx.TensorProto:
    if dtype == TensorProto.STRING:
        return helper.make_tensor(name, dtype, shape, [b"x"] * int(np.prod(shape, dtype=np.int64)))
    bits = 4 if dtype == TensorProto.INT4 else helper.tensor_dtype_to_np_dtype(dtype).itemsize * 8
    size = -(-int(np.prod(shape, dtype=np.int64)) * bits // 8)
    raw = _bytes(dtype, size, data)
    return onnx.TensorProto(name=name, data_type=dtype, dims=shape, raw_data=raw)


def _bytes(dtype: int, size: int, data: np.random.Generator) -> bytes:
    """Random bits, which are NaN and infinity at times, or sensible numbers."""
    if dtype == TensorProto.INT32 and data.random() < 0.8:  # a length
        return data.integers(0, 10, size // 4).astype(np.int32).tobytes()
    if dtype == TensorProto.FLOAT and data.random() < 0.8:
        return data.standard_normal(size // 4).astype(np.float32).tobytes()
    if dtype == TensorProto.FLOAT16 and data.random() < 0.8:
        return data.standard_normal(size // 2).astype(np.float16).tobytes()
    return data.bytes(size)


def run_case(seed: int, index: int, library: str) -> str:
    """Open and run one model; which of `OUTCOMES` it was, or "no model" where onnx itself cannot write it."""
    import onnxruntime as ort

    rng = random.Random(f"{seed}/{index}")
    try:
        content, fed, types = model(rng)
    except (ValueError, TypeError, OverflowError):
        return "no model"
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = rng.choice(
        (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    )
    options.register_custom_ops_library(library)
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's exceptions share no base class
        return OUTCOMES[0]
    data = np.random.default_rng(index)
    try:
        feeds = {}
        for value in session.get_inputs():
            shape = fed.get(value.name, [1])
            dtype = types[value.name]
            if dtype in (TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.STRING):
                return OUTCOMES[1]  # numpy cannot hand such a tensor over
            numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
            count = int(np.prod(shape, dtype=np.int64))
            raw = _bytes(dtype, count * numpy_type.itemsize, data)
            feeds[value.name] = np.frombuffer(raw, numpy_type).reshape(shape)
        session.run(None, feeds)
    except Exception:
        return OUTCOMES[1]
    return OUTCOMES[2]


def fuzz(cases: int, seed: int, sanitized: Path | None, start: int = 0) -> dict[str, int]:
    """Run cases in a process of their own; counts by outcome.

    Raises:
        RuntimeError: The process died; the message holds its last words and how to repeat it.
    """
    environment = dict(os.environ)
    if sanitized is not None:
        runtimes = [
            subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
            for name in ("asan", "ubsan")
        ]
        environment |= {
            "FPTQ_OPS_LIBRARY": str(sanitized),
            "LD_PRELOAD": ":".join(done.stdout.strip() for done in runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        command = [sys.executable, __file__, str(cases), "--seed", str(seed), "--start", str(start)]
        done = subprocess.run([*command, "--place", str(place)], env=environment, capture_output=True, text=True)
        if done.returncode:
            index = place.read_text() if place.is_file() else "?"
            words = "\n".join(done.stderr.splitlines()[-40:])
            raise RuntimeError(
                f"case {index} ended the process with status {done.returncode}; repeat it with\n"
                f"  python tests/hostile/fuzz_sessions.py 1 --seed {seed} --start {index}\n{words}"
            )
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def _work(cases: int, seed: int, start: int, place: Path) -> None:
    from fptq_onnx.ops import get_library_path

    library = str(get_library_path())
    counts: collections.Counter[str] = collections.Counter()
    with place.open("w") as mark:
        for index in range(start, start + cases):
            mark.seek(0)
            mark.write(str(index))
            mark.flush()
            counts[run_case(seed, index, library)] += 1
    print(json.dumps(counts))


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="first case")
    parser.add_argument("--sanitized", type=Path, metavar="LIBRARY", help="op library built with address,undefined")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.place is not None:
        _work(arguments.cases, arguments.seed, arguments.start, arguments.place)
        return 0
    try:
        print(json.dumps(fuzz(arguments.cases, arguments.seed, arguments.sanitized, arguments.start)))
    except RuntimeError as error:
        print(f"fuzz_sessions: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
