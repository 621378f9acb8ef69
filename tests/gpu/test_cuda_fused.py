"""Norms and SiLU that end in uint8, and int8 weights, on CUDAExecutionProvider against their references."""

import ml_dtypes
import numpy as np
import pytest
import torch
from gpu_bench.sessions import ELEMENT_TYPES, BoundRun, cuda_session, placement
from onnx import helper, numpy_helper

from fptq_onnx import ops
from fptq_onnx.ops import fused_quantize, w8a8_matmul

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
FUSED = list(fused_quantize.FUNCTIONS)
EPSILON = 1e-5
STATIC = (0.043, 117)


def to_numpy(tensor):
    return tensor.float().cpu().numpy().astype(NUMPY[tensor.dtype])


def run_op(library, op, inputs, outputs, constants=None, **attributes):
    """One node as a session on CUDA alone; `inputs` maps names to CUDA tensors, `outputs` to (shape, dtype)."""
    constants = constants or {}
    node = helper.make_node(op, [*inputs, *constants], list(outputs), name="the_node", domain=ops.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one_op",
        [helper.make_tensor_value_info(name, ELEMENT_TYPES[x.dtype], None) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], None) for name, (_, dtype) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), (ops.DOMAIN, ops.VERSION))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = cuda_session(model, library=library, config={"session.record_ep_graph_assignment_info": "1"})
    assert placement(session) == [(op, "CUDAExecutionProvider")]
    made = {
        name: torch.full(shape, 77 if dtype == torch.uint8 else float("nan"), dtype=dtype, device="cuda")
        for name, (shape, dtype) in outputs.items()
    }
    BoundRun(session, inputs, made)()
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 4096), (5, 576), (300, 1536), (3, 14336), (2, 100), (4, 20000)])
@pytest.mark.parametrize("op", FUSED)
def test_fused_step(library, generator, op, rows, k, dtype):
    def values(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    silu, skip, dynamic = "Silu" in op, "Skip" in op, "Dynamic" in op
    inputs = {"gate" if silu else "X": values(rows, k) * 3}
    if silu or skip:
        inputs["up" if silu else "skip"] = values(rows, k)
    if not silu:
        inputs["weight"] = values(k)
    arrays = [to_numpy(x) for x in inputs.values()]
    static = None if dynamic else STATIC
    if silu:
        expected = fused_quantize.silu_mul_reference(*arrays, static=static)
    else:
        x, *addend, weight = arrays
        expected = fused_quantize.rms_norm_reference(
            x, weight, np.float32(EPSILON), skip=addend[0] if skip else None, static=static
        )

    outputs = {"Y": ((rows, k), torch.uint8)}
    if dynamic:
        outputs["scale"] = ((rows, 1), torch.float32)
    if skip:
        outputs["sum"] = ((rows, k), dtype)
    constants = {} if dynamic else {"y_scale": np.float32(STATIC[0]), "y_zero_point": np.uint8(STATIC[1])}
    constants = {name: np.array(value) for name, value in constants.items()}
    made = run_op(library, op, inputs, outputs, constants, **({} if silu else {"epsilon": EPSILON}))
    # The order of the sum of squares, and the exponential, decide single values on a border of rounding.
    steps = np.abs(made["Y"].cpu().numpy().astype(int) - expected.y.astype(int))
    assert steps.max() <= 1
    assert np.mean(steps) <= 2e-3
    if dynamic:
        np.testing.assert_allclose(made["scale"].cpu().numpy(), expected.scale, rtol=2 * torch.finfo(dtype).eps)
    if skip:
        assert np.array_equal(to_numpy(made["sum"]), expected.sum)


@pytest.mark.parametrize("op", ["RMSNormDynamicQuantize", "SiluMulDynamicQuantize"])
def test_bad_and_empty_rows(library, op):
    silu = "Silu" in op
    x = torch.ones(4, 64, device="cuda")
    x[1] = 0
    x[2, 7] = float("nan")
    x[3, 9] = float("inf")
    inputs = {"X": x, "weight": torch.ones(64, device="cuda")} if not silu else {"X": x, "up": torch.ones_like(x)}
    outputs = {"Y": ((4, 64), torch.uint8), "scale": ((4, 1), torch.float32)}
    made = run_op(library, op, inputs, outputs, **({} if silu else {"epsilon": EPSILON}))
    assert (made["Y"][0] == 255).all()
    assert (made["Y"][1:3] == 128).all()
    assert made["scale"][1] == 1
    assert made["scale"][2].isnan()
    assert made["scale"][3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 576, 49152), (16, 4096, 1000), (3, 100, 7), (33, 1536, 576), (200, 640, 1064), (513, 257, 130)],
)
def test_int8_weights(library, generator, m, k, n, per_token, dtype):
    """Bytes equal the reference's: the sum is an integer, and its two factors are multiplied in a fixed order."""
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device="cuda", generator=generator)
    b = torch.randint(-128, 128, (k, n), device="cuda", generator=generator).to(torch.int8).cpu().numpy()
    b_scale = to_numpy((torch.rand(n, device="cuda", generator=generator) * 0.02 - 0.01).to(dtype))
    a_scale = torch.rand((m, 1) if per_token else (1,), device="cuda", generator=generator) * 0.1 + 0.01
    zero_point = 101
    expected = w8a8_matmul.reference(a.cpu().numpy(), a_scale.cpu().numpy(), zero_point, b, b_scale)
    constants = {"a_zero_point": np.array(zero_point, np.uint8), "B": b, "b_scale": b_scale}
    made = run_op(library, "W8A8MatMul", {"A": a, "a_scale": a_scale}, {"Y": ((m, n), dtype)}, constants)
    assert np.array_equal(to_numpy(made["Y"]), expected)
