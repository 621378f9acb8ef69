"""The CUDA operators inside onnxruntime: graph capture, concurrency, streams, memory, determinism, placement."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_bench.onnx_models import Activation, Format, ModelBuilder, layer_model, w4a8_layer, write_chain
from gpu_bench.problem import Shape, pack_int4, random_activations, random_weight
from gpu_bench.sessions import BoundRun, cuda_session, placement
from onnx import TensorProto, helper
from session_runs import CHAIN, buffers, check_at_once, check_callers_stream, run_once

TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
OURS = [Format.W4A8, Format.W4A8_STRUCTURED, Format.W4A8_STATIC]
TOKENS = [1, 5, 16, 48, 200, 1024]


@pytest.fixture(params=OURS, ids=[form.name for form in OURS])
def chain(request, tmp_path, generator):
    """A model of eight layers, in each of the project's forms."""
    return write_chain(tmp_path / "chain.onnx", CHAIN, request.param, 8, 2, generator)


def test_same_bytes_every_run_and_session(library, chain, generator):
    first, second = cuda_session(chain, library=library), cuda_session(chain, library=library)
    for tokens in TOKENS:
        x, _ = buffers(tokens, generator)
        expected = run_once(first, x)
        for _ in range(10):
            assert torch.equal(run_once(first, x), expected)
        assert torch.equal(run_once(second, x), expected)


def test_captured_graph_replays_with_new_inputs(library, chain, generator):
    eager, graph = cuda_session(chain, library=library), cuda_session(chain, library=library, graph=True)
    for graph_id, tokens in enumerate(TOKENS, start=1):
        x, y = buffers(tokens, generator)
        run = BoundRun(graph, {"X": x}, {"Y": y}, graph_id)
        for _ in range(4):  # two plain runs, the capture, a replay
            run()
        for _ in range(3):
            x.copy_(random_activations(tokens, CHAIN[0].k, torch.float16, generator))
            y.fill_(float("nan"))
            torch.cuda.synchronize()
            run()
            assert torch.equal(y, run_once(eager, x))


def test_concurrent_runs_on_one_session(library, chain, generator):
    session = cuda_session(chain, library=library)
    inputs = [buffers(tokens, generator)[0] for tokens in (1, 16, 200, 1024)]
    expected = [run_once(session, x) for x in inputs]
    check_at_once([session], inputs, expected)


def test_callers_stream(library, chain, generator):
    """On a stream of the caller's, work before and after the run is ordered by the stream alone."""
    stream = torch.cuda.Stream()
    session = cuda_session(chain, library=library, provider_options={"user_compute_stream": str(stream.cuda_stream)})
    check_callers_stream(stream, session, cuda_session(chain, library=library), 16, generator)


def test_second_device(library, chain, generator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, _ = buffers(16, generator)
    expected = run_once(cuda_session(chain, library=library), x)
    other = cuda_session(chain, library=library, provider_options={"device_id": "1"})
    x1 = x.to("cuda:1")
    y1 = torch.empty(x.shape[0], CHAIN[-1].n, dtype=torch.float16, device="cuda:1")
    BoundRun(other, {"X": x1}, {"Y": y1})()
    assert torch.equal(y1.cpu(), expected.cpu())


def test_every_product_on_cuda_without_copies(library, chain, tmp_path, generator):
    config = {"session.record_ep_graph_assignment_info": "1"}
    session = cuda_session(chain, library=library, config=config, profile=tmp_path / "profile")
    placed = placement(session)
    assert sum(op == "W4A8MatMul" for op, _ in placed) == 8
    assert {provider for op, provider in placed if op in ("W4A8MatMul", "DynamicQuantizePerToken")} == {
        "CUDAExecutionProvider"
    }
    run_once(session, buffers(16, generator)[0])
    with open(session.end_profiling(), encoding="utf-8") as file:
        executed = [event["args"] for event in json.load(file) if event.get("cat") == "Node" and "args" in event]
    ran = {(args["op_name"], args["provider"]) for args in executed if "provider" in args}
    assert ("W4A8MatMul", "CUDAExecutionProvider") in ran
    assert not [op for op, _ in ran if op.startswith("Memcpy")]
    assert {provider for _, provider in ran} == {"CUDAExecutionProvider"}


MEMORY = """
import sys
from pathlib import Path

import numpy as np
import torch
from gpu_bench.sessions import cuda_session

before = None
for model, k in ((sys.argv[2], 256), (sys.argv[3], 8192)):  # the first loads the libraries' code
    before = torch.cuda.mem_get_info()[0]
    session = cuda_session(Path(model), library=sys.argv[1])
    y = session.run(["Y"], {"X": np.ones((1, k), np.float16)})[0]
    torch.cuda.synchronize()
    assert np.isfinite(y).all()
    if k == 256:
        tiny = session
print(before - torch.cuda.mem_get_info()[0])
"""


@pytest.mark.whole_device
def test_weights_are_held_once(library, tmp_path, generator):
    """40 layers of 8192 x 8192 take at most 1.1 times their int4 bytes, everything that a session takes included.

    Without CUBLAS_WORKSPACE_CONFIG every session holds 148 MB more: the workspaces of its two cuBLAS handles, which
    W4A8 layers never use.
    """
    shape, layers = Shape(8192, 8192), 40
    builder = ModelBuilder(tmp_path / "big.onnx")
    weight = random_weight(shape, 128, torch.float16, generator)
    # The file holds one weight, but every layer has initializers of its own.
    names = [
        builder.external("B", TensorProto.INT4, [shape.k, shape.n], pack_int4(weight.values)),
        builder.external("b_scale", TensorProto.FLOAT16, list(weight.scale.shape), weight.scale),
    ]
    value = "X"
    for layer in range(layers):
        output = "Y" if layer == layers - 1 else f"h{layer}"
        builder.node("DynamicQuantizePerToken", [value], [f"{value}_q", f"{value}_s"], "fptq")
        own = [builder.alias(f"{name}_{layer}", name) for name in names]
        w4a8_layer(builder, f"{value}_q", f"{value}_s", own, output, 128)
        value = output
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["M", 8192]) for name in ("X", "Y")]
    big = builder.save(ends[:1], ends[1:])
    tiny = tmp_path / "tiny.onnx"
    tiny.write_bytes(layer_model(random_weight(Shape(256, 256), 128, torch.float16, generator), Activation.PER_TOKEN))

    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    environment["PYTHONPATH"] = os.pathsep.join([TOOLS, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", MEMORY, library, str(tiny), str(big)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    used, packed = int(done.stdout.split()[-1]), layers * shape.int4_bytes
    print(f"{used / packed:.3f} times the packed int4 bytes")
    assert packed <= used <= 1.1 * packed


@pytest.mark.parametrize("tokens", [1, 16, 40, 300])
def test_integer_structured_scales_give_the_cpus_bytes(library, generator, tokens):
    """With multipliers of both signs, as the recipes choose them: all sums are integers on both providers."""
    import onnxruntime as ort

    weight = random_weight(Shape(1024, 384), 128, torch.float16, generator, structured=True)
    assert weight.scale.min() < 0 < weight.scale.max()
    model = layer_model(weight, Activation.PER_TOKEN)
    x = random_activations(tokens, 1024, torch.float16, generator).cpu().numpy()
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    cpu = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"X": x})
    for on_cpu, on_cuda in zip(cpu, cuda_session(model, library=library).run(None, {"X": x}), strict=True):
        assert np.array_equal(on_cpu, on_cuda)


def test_falls_back_to_the_cpu_kernel_without_cuda_provider(library, tmp_path, generator):
    """One file, one library: the same model runs on the CPU provider and agrees within the output type's rounding."""
    import onnxruntime as ort

    weight = random_weight(Shape(512, 384), 128, torch.float16, generator)
    model = layer_model(weight, Activation.PER_TOKEN)
    x = random_activations(9, 512, torch.float16, generator).cpu().numpy()
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    cpu = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"X": x})
    cuda = cuda_session(model, library=library).run(None, {"X": x})
    assert np.array_equal(cpu[1], cuda[1])
    assert np.array_equal(cpu[2], cuda[2])
    np.testing.assert_allclose(cpu[0].astype(np.float32), cuda[0].astype(np.float32), rtol=2e-3, atol=4e-3)
