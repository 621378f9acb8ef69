"""DynamicQuantizeW4A8MatMul on CUDAExecutionProvider: the bytes of its two ops, captured, concurrent, on any stream."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_bench.onnx_models import Format, write_chain
from gpu_bench.problem import Shape, pack_int4, random_activations, random_weight
from gpu_bench.sessions import ELEMENT_TYPES, BoundRun, cuda_session, placement
from onnx import TensorProto, helper
from session_runs import CHAIN, buffers, check_at_once, check_callers_stream, run_once

from fptq_onnx.ops import DOMAIN, VERSION
from fptq_onnx.ops.inspection import Product, kernel_name

FUSED = "DynamicQuantizeW4A8MatMul"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows that one kernel may quantize and multiply, and rows beyond them, which take workspace.
ROWS = [*range(1, 18), 64, 200, 1000]


def layer(weight, *, separate=True):
    """X -> Y by the one op and, where `separate`, Z by the two, as a serialized model."""
    element = ELEMENT_TYPES[weight.scale.dtype]
    k, n = weight.values.shape
    packed = pack_int4(weight.values).cpu().numpy().tobytes()
    scale = weight.scale.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    initializers = [
        helper.make_tensor("B", TensorProto.INT4, [k, n], packed, raw=True),
        helper.make_tensor("b_scale", element, list(weight.scale.shape), scale, raw=True),
        helper.make_tensor("zero_point", TensorProto.UINT8, [], bytes([128]), raw=True),
    ]
    attributes = {"block_size": weight.block, "scale_max_multiple": weight.scale_max_multiple}
    nodes = [helper.make_node(FUSED, ["X", "B", "b_scale"], ["Y"], "fused", domain=DOMAIN, **attributes)]
    if separate:
        product = ["A", "a_scale", "zero_point", "B", "b_scale"]
        nodes += [
            helper.make_node("DynamicQuantizePerToken", ["X"], ["A", "a_scale"], "quantize", domain=DOMAIN),
            helper.make_node("W4A8MatMul", product, ["Z"], "matmul", domain=DOMAIN, **attributes),
        ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("X", element, ["M", k])],
        [helper.make_tensor_value_info(name, element, ["M", n]) for name in "YZ"[: len(nodes)]],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def both(session, x, n):
    """Results of the one op and of the two, on poisoned memory."""
    made = {name: torch.full((x.shape[0], n), float("nan"), dtype=x.dtype, device="cuda") for name in "YZ"}
    BoundRun(session, {"X": x}, made)()
    return made["Y"], made["Z"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structured", [False, True], ids=["float-scales", "integer-scales"])
@pytest.mark.parametrize(
    ("k", "n", "block"),
    [
        (4096, 1000, 128),
        (576, 1536, 128),
        (14336, 512, 128),
        (1056, 64, 32),
        (2064, 200, 32),
        (1000, 129, 1000),
        (100, 7, 32),
        (257, 130, 9),
    ],
)
def test_bytes_are_those_of_the_two_ops(library, generator, k, n, block, structured, dtype):
    weight = random_weight(Shape(k, n), block, dtype, generator, structured=structured)
    session = cuda_session(layer(weight), library=library, config={"session.record_ep_graph_assignment_info": "1"})
    assert (FUSED, "CUDAExecutionProvider") in placement(session)
    for rows in ROWS:
        x = random_activations(rows, k, dtype, generator)
        one, two = both(session, x, n)
        assert torch.isfinite(two).all()
        assert torch.equal(one, two), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "inside"), [(4, 4096, True), (8, 4096, True), (8, 1024, False), (40, 1024, False)]
)
def test_rows_that_are_zero_or_not_finite(library, generator, rows, k, inside, dtype):
    n = 192
    if torch.cuda.get_device_capability(0) == (9, 0):
        name = kernel_name(Product(rows, k, n, 128, True, dtype.itemsize, True), cuda_device=0)
        assert name.endswith("quantizing") == inside
    weight = random_weight(Shape(k, n), 128, dtype, generator, structured=True)
    session = cuda_session(layer(weight), library=library)
    x = random_activations(rows, k, dtype, generator)
    plain = both(session, x, n)[0]
    x[0] = 0
    faults = {2: (1023, float("nan")), 3: (0, float("inf")), 5: (517, -float("inf")), 6: (slice(None), float("nan"))}
    bad = [row for row in faults if row < rows]
    for row in bad:
        column, value = faults[row]
        x[row, column] = value
    one, two = both(session, x, n)
    assert one[bad].isnan().all() and two[bad].isnan().all()
    assert (one[0] == 0).all()
    good = [row for row in range(1, rows) if row not in bad]
    assert torch.equal(one[good], plain[good])


def test_no_rows(library, generator):
    weight = random_weight(Shape(256, 96), 128, torch.float16, generator)
    session = cuda_session(layer(weight), library=library)
    y, z = session.run(None, {"X": np.empty((0, 256), np.float16)})
    assert y.shape == z.shape == (0, 96)


@pytest.fixture(
    params=[(Format.W4A8_ONE_OP, Format.W4A8), (Format.W4A8_STRUCTURED_ONE_OP, Format.W4A8_STRUCTURED)],
    ids=["float-scales", "integer-scales"],
)
def chains(request, tmp_path):
    """Files of six layers of the one op, and of the two on the same weights."""
    seeded = [(form, torch.Generator("cuda").manual_seed(5)) for form in request.param]
    return [write_chain(tmp_path / f"{form.name}.onnx", CHAIN, form, 6, 3, generator) for form, generator in seeded]


def test_captured_graphs_replay_with_new_inputs(library, chains, generator):
    """One graph per number of rows, among them those that take workspace; all of them are replayed in turn."""
    graph = cuda_session(chains[0], library=library, graph=True)
    eager, separate = (cuda_session(chain, library=library) for chain in chains)
    runs = []
    for graph_id, rows in enumerate([1, 5, 16, 17, 64, 300, 1024], start=1):
        x, y = buffers(rows, generator)
        run = BoundRun(graph, {"X": x}, {"Y": y}, graph_id)
        for _ in range(4):  # two plain runs, the capture, a replay
            run()
        runs.append((run, x, y))
    for _ in range(3):
        for run, x, y in runs:
            x.copy_(buffers(x.shape[0], generator)[0])
            y.fill_(float("nan"))
            torch.cuda.synchronize()
            run()
            expected = run_once(separate, x)
            assert torch.equal(y, expected)
            assert torch.equal(run_once(eager, x), expected)


def test_concurrent_runs_on_one_session(library, chains, generator):
    """Runs on streams of their own; none gets the workspace that another's kernels still read."""
    session, separate = (cuda_session(chain, library=library) for chain in chains)
    inputs = [buffers(rows, generator)[0] for rows in (1, 16, 40, 200, 1024, 1024)]
    check_at_once([session], inputs, [run_once(separate, x) for x in inputs])


def test_concurrent_runs_on_one_stream(library, chains, generator):
    """All sessions and threads on one stream of the caller's share one workspace, and the stream's order keeps it."""
    stream = torch.cuda.Stream()
    options = {"user_compute_stream": str(stream.cuda_stream)}
    sessions = [cuda_session(chains[0], library=library, provider_options=options) for _ in range(2)]
    separate = cuda_session(chains[1], library=library)
    inputs = [buffers(rows, generator)[0] for rows in (17, 40, 200, 1024)]
    check_at_once(sessions, inputs, [run_once(separate, x) for x in inputs])


@pytest.mark.whole_device
def test_workspace_is_freed_with_the_last_session(library, generator, tmp_path):
    path = tmp_path / "layer.onnx"
    path.write_bytes(layer(random_weight(Shape(16384, 64), 128, torch.float16, generator), separate=False))
    x = torch.ones(16384, 16384, dtype=torch.float16, device="cuda")
    y = torch.empty(16384, 64, dtype=torch.float16, device="cuda")
    free = []
    for _ in range(3):
        session = cuda_session(path, library=library)
        BoundRun(session, {"X": x}, {"Y": y})()
        free.append(torch.cuda.mem_get_info()[0])
        del session
    free.append(torch.cuda.mem_get_info()[0])
    assert abs(free[0] - free[2]) < 64 << 20  # each takes 256 MB, one after the other
    assert free[3] - free[2] > 200 << 20


@pytest.mark.parametrize("rows", [16, 300])
def test_callers_stream(library, chains, generator, rows):
    """On a stream of the caller's, work before and after the run is ordered by the stream alone."""
    stream = torch.cuda.Stream()
    session = cuda_session(
        chains[0], library=library, provider_options={"user_compute_stream": str(stream.cuda_stream)}
    )
    check_callers_stream(stream, session, cuda_session(chains[1], library=library), rows, generator)


NO_MEMORY = """
import sys
from pathlib import Path

import torch
from gpu_bench.sessions import BoundRun, cuda_session

session = cuda_session(Path(sys.argv[2]), library=sys.argv[1])


def run(rows):
    x = torch.ones(rows, 16384, dtype=torch.float16, device="cuda")
    y = torch.zeros(rows, 64, dtype=torch.float16, device="cuda")
    return BoundRun(session, {"X": x}, {"Y": y}), y


few, wanted = run(40)
few()
expected = wanted.clone()
many, result = run(16384)  # 256 MB of workspace
hog = torch.empty(torch.cuda.mem_get_info()[0] - (128 << 20), dtype=torch.uint8, device="cuda")
try:
    many()
except Exception as error:
    print("refused:", error)
few()
assert torch.equal(wanted, expected)
del hog
torch.cuda.empty_cache()
many()
assert torch.equal(result[:40], expected)
"""


@pytest.mark.whole_device
def test_too_little_memory_is_an_error_and_the_session_goes_on(library, generator, tmp_path):
    path = tmp_path / "layer.onnx"
    path.write_bytes(layer(random_weight(Shape(16384, 64), 128, torch.float16, generator), separate=False))
    tools = str(Path(__file__).resolve().parents[2] / "tools")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tools, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", NO_MEMORY, library, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{FUSED} node 'fused': there is no memory for" in done.stdout
