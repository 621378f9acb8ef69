"""W4A8MatMul and DynamicQuantizePerToken on CUDAExecutionProvider against exact arithmetic."""

import random

import pytest
import torch
from gpu_bench.onnx_models import Activation, layer_model, static_scale
from gpu_bench.problem import (
    EXCESS_TOLERANCE,
    ZERO_POINT,
    Shape,
    Weight,
    excess_error,
    quantize_per_token,
    random_activations,
    random_weight,
    reference,
)
from gpu_bench.sessions import BoundRun, cuda_session

from fptq_onnx.ops.inspection import Product, describe_library, kernel_name

POISON = {torch.uint8: 77}


def run_layer(library, model, inputs, outputs):
    """Run once on poisoned outputs; `outputs` maps names to (shape, dtype)."""
    made = {
        name: torch.full(shape, POISON.get(dtype, float("nan")), dtype=dtype, device="cuda")
        for name, (shape, dtype) in outputs.items()
    }
    BoundRun(cuda_session(model, library=library), inputs, made)()
    return made


def draw(seed):
    """One random problem; every regime of the kernels and every edge is drawn somewhere in 300 seeds."""
    rng = random.Random(seed)
    k = rng.choice([rng.randint(1, 300), rng.randint(1, 1500), 128 * rng.randint(1, 20), 576, 1000, 4096])
    n = rng.choice([rng.randint(1, 300), rng.randint(1, 1200), 64 * rng.randint(1, 24), 4096])
    block = min(k, rng.choice([128, 128, 128, 64, 32, 256, k, rng.randint(1, k)]))
    m = rng.choice([1, 2, 3, 4, rng.randint(1, 16), rng.randint(17, 64), rng.randint(65, 130), rng.randint(131, 700)])
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    activation = rng.choice(list(Activation))
    if activation is Activation.STATIC and dtype == torch.bfloat16:
        dtype = torch.float16  # onnxruntime's CUDA QuantizeLinear has no bfloat16
    return rng, Shape(k, n), block, m, dtype, activation


@pytest.mark.parametrize("seed", range(300))
def test_random_problem(library, seed):
    rng, shape, block, m, dtype, activation = draw(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    structured = rng.random() < 0.4
    weight = random_weight(shape, block, dtype, generator, structured=structured)
    if rng.random() < 0.3:
        signs = torch.randint(0, 2, weight.scale.shape, device="cuda", generator=generator) * 2 - 1
        weight = Weight(weight.values, (weight.scale * signs).to(dtype), block, weight.scale_max_multiple)
    zero_point = ZERO_POINT if activation is Activation.PER_TOKEN else rng.choice([0, 1, 100, 128, 255])
    per_token = activation is Activation.PER_TOKEN or (activation is Activation.QUANTIZED and rng.random() < 0.5)
    leading = (m,) if rng.random() < 0.5 else (1, m) if m % 2 else (2, m // 2)
    model = layer_model(weight, activation, rank=len(leading) + 1, zero_point=zero_point, per_token=per_token)

    outputs = {"Y": ((*leading, shape.n), dtype)}
    x = random_activations(m, shape.k, dtype, generator).view(*leading, shape.k)
    if activation is Activation.QUANTIZED:
        a = torch.randint(0, 256, x.shape, dtype=torch.uint8, device="cuda", generator=generator)
        a_scale = torch.rand((*leading, 1) if per_token else (), device="cuda", generator=generator) * 0.02 + 0.001
        made = run_layer(library, model, {"A": a, "a_scale": a_scale}, outputs)
    else:
        outputs["A"] = (x.shape, torch.uint8)
        if activation is Activation.PER_TOKEN:
            outputs["a_scale"] = ((*leading, 1), torch.float32)
        made = run_layer(library, model, {"X": x}, outputs)
        a, a_scale = made["A"], made.get("a_scale", static_scale(dtype).cuda())
        if activation is Activation.PER_TOKEN:
            expected_a, expected_scale = quantize_per_token(x)
            assert torch.equal(a_scale, expected_scale)
            assert torch.equal(a, expected_a)
    rows = a_scale.reshape(-1, 1) if per_token else a_scale
    expected = reference(a.view(m, shape.k), rows, weight, zero_point)
    error = excess_error(made["Y"].view(m, shape.n), expected)
    assert error <= EXCESS_TOLERANCE, (shape, block, m, dtype, activation)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 100, 150, 256, 1000])
def test_integer_part_is_exact(library, generator, tokens, structured):
    """Unit scales and a float32 output show the kernel's integer sums, which prove that activations are int8."""
    shape, block = Shape(4096 + 64, 1024 + 40), 128
    weight = random_weight(shape, block, torch.float32, generator, structured=structured)
    low, high = (-15, 16) if structured else (1, 2)
    multiples = torch.randint(low, high, weight.scale.shape, device="cuda", generator=generator)
    weight = Weight(weight.values, multiples.float(), block, 15 if structured else 0)
    a = torch.randint(0, 256, (tokens, shape.k), dtype=torch.uint8, device="cuda", generator=generator)
    model = layer_model(weight, Activation.QUANTIZED, per_token=False, zero_point=101)
    one = torch.ones((), device="cuda")
    y = run_layer(library, model, {"A": a, "a_scale": one}, {"Y": ((tokens, shape.n), torch.float32)})["Y"]
    exact = (a.cpu().long() - 101) @ (
        weight.values.cpu().long() * multiples.cpu().repeat_interleave(block, 0)[: shape.k]
    )
    assert exact.abs().max() < 2**24
    assert torch.equal(y.cpu().long(), exact)


@pytest.mark.parametrize("tokens", [20, 33, 64])
@pytest.mark.parametrize("structured", [False, True])
def test_deep_tiles_without_a_twin(library, generator, tokens, structured):
    """Two CTAs bring activations for each other; of an odd number of strips the last one's twin has no channels."""
    shape, block = Shape(4096, 96 * 64 + 40), 128
    if "warpgroup" in describe_library(library).gpus[0].kernels:
        assert "warpgroup 64x64" in kernel_name(Product(tokens, shape.k, shape.n, block, structured, 4), cuda_device=0)
    weight = random_weight(shape, block, torch.float32, generator, structured=structured)
    weight = Weight(weight.values, torch.ones_like(weight.scale), block, 15 if structured else 0)
    a = torch.randint(0, 256, (tokens, shape.k), dtype=torch.uint8, device="cuda", generator=generator)
    model = layer_model(weight, Activation.QUANTIZED, per_token=False, zero_point=128)
    one = torch.ones((), device="cuda")
    y = run_layer(library, model, {"A": a, "a_scale": one}, {"Y": ((tokens, shape.n), torch.float32)})["Y"]
    assert torch.equal(y.double(), (a.double() - 128) @ weight.values.double())


@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("structured", [False, True])
def test_many_rounds_of_few_blocks(library, generator, tokens, structured):
    """Warps of a group that wait for nothing in between may be rounds apart: their sums must not meet in an inbox."""
    shape, block = Shape(512, 65536), 128
    weight = random_weight(shape, block, torch.float32, generator, structured=structured)
    weight = Weight(weight.values, torch.ones_like(weight.scale), block, 15 if structured else 0)
    a = torch.randint(0, 256, (tokens, shape.k), dtype=torch.uint8, device="cuda", generator=generator)
    model = layer_model(weight, Activation.QUANTIZED, per_token=False, zero_point=128)
    exact = (a.double() - 128) @ weight.values.double()  # below 2^53
    outputs = {"Y": torch.empty(tokens, shape.n, device="cuda")}
    run = BoundRun(cuda_session(model, library=library), {"A": a, "a_scale": torch.ones((), device="cuda")}, outputs)
    for _ in range(10):
        outputs["Y"].fill_(float("nan"))
        run()
        assert torch.equal(outputs["Y"].double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_special_rows(library, generator, dtype):
    """Rows of zeros, subnormals, ties, NaN and infinity follow the operator's definition."""
    weight = random_weight(Shape(256, 64), 128, dtype, generator)
    x = random_activations(6, 256, dtype, generator)
    x[0] = 0
    x[1] = torch.finfo(dtype).tiny / 4
    x[2] = (torch.arange(256, device="cuda") - 128).to(dtype) / 2
    x[2, 0] = 127  # scale exactly 1: halves are ties
    x[3, 5] = float("nan")
    x[4, 7] = float("inf")
    outputs = {
        "Y": ((6, 64), dtype),
        "A": (x.shape, torch.uint8),
        "a_scale": ((6, 1), torch.float32),
    }
    made = run_layer(library, layer_model(weight, Activation.PER_TOKEN), {"X": x}, outputs)
    good = [0, 1, 2, 5]
    expected_a, expected_scale = quantize_per_token(x[good])
    assert torch.equal(made["a_scale"][good], expected_scale)
    assert torch.equal(made["A"][good], expected_a)
    # A row of zeros has scale 1, and is 128 times a sum of weights less the same: what is left is float32's rounding.
    assert made["Y"][0].abs().max() <= 1e-4
    for bad in (3, 4):
        assert made["a_scale"][bad].isnan()
        assert (made["A"][bad] == ZERO_POINT).all()
        assert made["Y"][bad].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_next_to_borders(library, generator, dtype):
    """Rows up to every significand, of values on the borders between two integers and beside them."""
    bits = 7 if dtype == torch.bfloat16 else 10
    largest = (1 + torch.arange(2**bits, device="cuda") / 2**bits).to(dtype).unsqueeze(1)
    borders = ((torch.arange(127, device="cuda") + 0.5) * largest.float() / 127).to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    beside = [(borders.view(integer) + step).view(dtype) for step in (-1, 1)]
    x = torch.cat([borders, *beside, largest / 2, largest, torch.zeros_like(largest)], dim=1)
    x = torch.minimum(torch.cat([x, -x], dim=1), largest).contiguous()
    weight = random_weight(Shape(x.shape[1], 64), 128, dtype, generator)
    outputs = {"Y": ((len(x), 64), dtype), "A": (x.shape, torch.uint8), "a_scale": ((len(x), 1), torch.float32)}
    made = run_layer(library, layer_model(weight, Activation.PER_TOKEN), {"X": x}, outputs)
    expected_a, expected_scale = quantize_per_token(x)
    assert torch.equal(made["a_scale"], expected_scale)
    assert torch.equal(made["A"], expected_a)


@pytest.mark.parametrize("activation", [Activation.PER_TOKEN, Activation.STATIC])
def test_no_tokens(library, generator, activation):
    weight = random_weight(Shape(256, 96), 128, torch.float16, generator)
    session = cuda_session(layer_model(weight, activation), library=library)
    import numpy as np

    y, *_ = session.run(None, {"X": np.empty((0, 256), np.float16)})
    assert y.shape == (0, 96)
    y, *_ = session.run(None, {"X": np.ones((3, 256), np.float16)})
    assert y.shape == (3, 96)
    assert np.isfinite(y).all()
