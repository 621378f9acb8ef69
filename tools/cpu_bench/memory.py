"""Mode "memory": what a session on many layers holds, beside the bytes of their packed int4 weights."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cpu_bench.records import write_record
from fptq_onnx import ops

__all__ = ["add_arguments", "run", "write_layers"]

_RESIDENT = """
import sys
import onnxruntime as ort

def resident():
    fields = {}
    for line in open("/proc/self/smaps_rollup"):
        name, *rest = line.split()
        fields[name] = rest[0]
    return int(fields["Rss:"]) * 1024

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def open_session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(sys.argv[2])
    return ort.InferenceSession(path, options)

open_session(sys.argv[1])  # pages of the libraries themselves
before = resident()
session = open_session(sys.argv[3])
print(resident() - before, peak() - before)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096, help="K and N of each layer")
    parser.add_argument("--folder", type=Path, help="where the model of 0.5 GB is written (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="record to write (default: a new file in tools/records)")


def run(arguments: argparse.Namespace) -> int:
    """Measure in a fresh process, print, write the record; returns the exit status."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        small = write_layers(Path(folder) / "one.onnx", 1, 256)
        large = write_layers(Path(folder) / "many.onnx", arguments.layers, arguments.size)
        command = [sys.executable, "-c", _RESIDENT, str(small), str(ops.get_library_path()), str(large)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, peak = (int(number) for number in output.split())
    packed = arguments.layers * arguments.size**2 // 2
    row = {
        "layers": arguments.layers,
        "size": arguments.size,
        "int4_bytes": packed,
        "resident_bytes": held,
        "resident_over_int4": held / packed,
        "peak_over_int4": peak / packed,
    }
    print(
        f"{arguments.layers} layers of {arguments.size}x{arguments.size}: {held / packed:.3f} times the int4 bytes "
        f"resident, {peak / packed:.3f} at the peak of loading"
    )
    protocol = {
        "unit": "bytes that the resident set grows by when a session is created, weights in an external file",
        "groups": "128, one float32 scale each",
    }
    print(write_record("cpu-memory", {"protocol": protocol, "rows": [row]}, arguments.json), file=sys.stderr)
    return 0


def write_layers(path: Path, count: int, size: int) -> Path:
    """Write `count` products of one activation with different int4 weights [size, size], data in an external file."""
    rng = np.random.default_rng(0)
    groups = size // 128
    a = ir.Value(name="A", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["M", size]))
    a_scale = ir.Value(name="a_scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    constants = [_constant(ir.tensor(np.array(128, np.uint8), name="zero_point"))]
    nodes = []
    for i in range(count):
        packed = rng.integers(0, 256, size * size // 2, np.uint8)
        weight = ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape([size, size]), name=f"B{i}")
        operands = [_constant(weight), _constant(ir.tensor(np.ones((groups, size), np.float32), name=f"s{i}"))]
        node = ops.w4a8_matmul.w4a8_matmul(a, a_scale, constants[0], *operands, block_size=128, name=f"n{i}")
        node.outputs[0].name = f"Y{i}"
        nodes.append(node)
        constants += operands
    graph = ir.Graph(
        [a, a_scale],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=constants,
        opset_imports={"": ops.BODY_OPSET, ops.DOMAIN: ops.VERSION},
        name="layers",
    )
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")
    os.sync()  # dirty pages of the file would count as ours
    return path


def _constant(tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
