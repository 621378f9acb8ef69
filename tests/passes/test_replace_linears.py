"""The rewritten graph computes exactly what the numpy references say, and nothing else is touched."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import families
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from conversions import constants, converted, relative_error, values
from pass_models import parse, tokens, weight

from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.ops import dynamic_quantize_per_token, w4a8_matmul
from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.replace_linears import (
    ActivationQuantizer,
    LayerQuantization,
    PerTokenQuantizer,
    StaticQuantizer,
)
from fptq_onnx.passes.to_w4a8 import ToW4A8Pass
from fptq_onnx.quantization.int4 import QuantizedWeight, quantize_weight

STATIC = StaticQuantizer(0.02, 121)


def _int4(layer: LinearLayer) -> QuantizedWeight:
    return quantize_weight(layer.weight_array(), 16, "signed8", layer.activation.dtype.numpy())


def _quantize(model: ir.Model, quantizer: ActivationQuantizer, *names: str, weight=_int4) -> list[str]:
    """Quantize the named layers, or all; names of the integer products that the graph has then."""
    layers = {layer.name: layer for layer in find_linears(model).layers}
    chosen = names or list(layers)
    computed = {name: None if weight is None else weight(layers[name]) for name in chosen}
    decisions = {
        name: LayerQuantization(quantizer, None if q is None else partial(lambda q: q, q))
        for name, q in computed.items()
    }
    assert ToW4A8Pass(decisions)(model).modified == bool(chosen)
    AddFunctionsPass()(model)
    return [str(node.name) for node in model.graph if node.op_type == "W4A8MatMul"]


def _static(x: np.ndarray, scale: np.ndarray, zero_point: int) -> np.ndarray:
    """QuantizeLinear: float32 division, round half to even, saturate."""
    return np.clip(np.rint(x / scale.astype(x.dtype)) + zero_point, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("quantizer", [STATIC, PerTokenQuantizer()], ids=["static", "per-token"])
def test_shared_activation_is_quantized_once(tmp_path: Path, quantizer: ActivationQuantizer) -> None:
    """Also behind an Identity; each layer keeps its name, its output's name and its bias."""
    body = (
        "a = Tanh(X)\nY = MatMul(a, w1)\nsame = Identity(a)\nproduct = MatMul(same, w2)\nZ = Add(product, bias)\n"
        "b = Sigmoid(X)\nV = MatMul(b, w3)"
    )
    w = {"w1": weight(seed=1), "w2": weight(seed=2), "w3": weight(seed=3), "bias": weight(1, 10, 4)[0]}
    model = parse(tmp_path, "(float[B, S, 24] X) => (float[B, S, 10] Y, float[B, S, 10] Z, float[B, S, 10] V)", body, w)
    layers = {layer.output.name: layer.name for layer in find_linears(model).layers}
    expected_weights = {layer.name: _int4(layer) for layer in find_linears(model).layers}
    assert _quantize(model, quantizer) == list(layers.values())

    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["QuantizeLinear"] + kinds["DynamicQuantizePerToken"] == 2
    assert kinds["W4A8MatMul"] == 3 and kinds["MatMul"] == 0
    x = tokens()
    found = values(model, ["Y", "Z", "V"], {"X": x})
    for output, source in (("Y", np.tanh(x)), ("Z", np.tanh(x)), ("V", 1 / (1 + np.exp(-x)))):
        q = expected_weights[layers[output]]
        if isinstance(quantizer, StaticQuantizer):
            a, scale, zero = _static(source, np.float32(quantizer.scale), 121), np.float32(quantizer.scale), 121
        else:
            (a, scale), zero = dynamic_quantize_per_token.reference(source), 128
        wanted = w4a8_matmul.reference(a, scale, zero, q.q, q.scale, q.block_size)
        # Tanh and Sigmoid differ in the last bit between numpy and onnxruntime: at most a few values round apart
        difference = np.abs(found[output] - (wanted + (w["bias"] if output == "Z" else 0)))
        assert np.median(difference) < 1e-6 * np.abs(wanted).max()
        assert difference.max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_bias_becomes_an_add(tmp_path: Path, transposed: int) -> None:
    w, c = weight(), weight(1, 10, 3)[0]
    model = parse(
        tmp_path,
        "(float[B, 24] X) => (float[B, 10] Y)",
        f"Y = Gemm<alpha = 0.5, beta = 2.0, transB = {transposed}>(X, w, c)",
        {"w": w.T.copy() if transposed else w, "c": c},
    )
    _quantize(model, STATIC)
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "W4A8MatMul", "Add"]
    x = tokens()[0]
    q = quantize_weight(0.5 * w, 16, "signed8", np.float32)
    a = _static(x, np.float32(STATIC.scale), STATIC.zero_point)
    wanted = w4a8_matmul.reference(a, STATIC.scale, STATIC.zero_point, q.q, q.scale, 16) + 2 * c
    np.testing.assert_allclose(values(model, ["Y"], {"X": x})["Y"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", [STATIC, PerTokenQuantizer()], ids=["static", "per-token"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_types(tmp_path: Path, quantizer: ActivationQuantizer, dtype: type) -> None:
    """bfloat16 has no QuantizeLinear kernel and goes through float32; the kernel gets the scale that was stored."""
    name = "float16" if dtype is np.float16 else "bfloat16"
    model = parse(
        tmp_path,
        "(float[B, S, 24] X) => (float[B, S, 10] Y)",
        f"x = Cast<to = {10 if name == 'float16' else 16}>(X)\ny = MatMul(x, w)\nY = Cast<to = 1>(y)",
        {"w": weight().astype(dtype)},
    )
    for value in (model.graph.node(0).outputs[0], model.graph.node(1).outputs[0]):
        value.type = ir.TensorType(ir.DataType.FLOAT16 if name == "float16" else ir.DataType.BFLOAT16)
    scale = StaticQuantizer(float(np.float16(0.02)), 121)  # exact in both
    _quantize(model, scale if isinstance(quantizer, StaticQuantizer) else quantizer)
    x = tokens()
    half = x.astype(dtype)
    q = quantize_weight(weight().astype(dtype).astype(np.float32), 16, "signed8", dtype)
    if isinstance(quantizer, StaticQuantizer):
        stored = np.float32(scale.scale)
        a, a_scale, zero = _static(half.astype(np.float32), stored, 121), stored, 121
    else:
        (a, a_scale), zero = dynamic_quantize_per_token.reference(half), 128
    wanted = w4a8_matmul.reference(a, a_scale, zero, q.q, q.scale, 16)
    found = values(model, ["Y"], {"X": x})["Y"]
    assert relative_error(found, wanted) < (2e-3 if name == "float16" else 1e-2)


def test_every_layer_of_a_model_equals_the_references() -> None:
    """Each quantize node and each integer product of the saved file, on the activations it really gets."""
    result = converted("llama", families.DYNAMO)
    model = load_model(result.path)
    arrays = constants(model)
    products = [node for node in model.graph if node.op_type == "W4A8MatMul"]
    quantizers = {node.inputs[0].producer() for node in products}
    assert len(products) == 21 and len(quantizers) == 12
    kinds = Counter(node.op_type for node in quantizers)
    assert kinds == {"QuantizeLinear": 11, "DynamicQuantizePerToken": 1}

    wanted = [value.name for q in quantizers for value in (q.inputs[0], *q.outputs)]
    wanted += [node.outputs[0].name for node in products]
    feeds = result.tiny.feeds(result.tiny.token_ids())
    found = values(model, list(dict.fromkeys(wanted)), feeds)
    for node in quantizers:
        x, a = found[node.inputs[0].name], found[node.outputs[0].name]
        if node.op_type == "QuantizeLinear":
            scale, zero_point = (arrays[value.name] for value in node.inputs[1:])
            assert zero_point == 128  # the paper's symmetric activations
            np.testing.assert_array_equal(a, _static(x, scale, 128))
        else:
            for ours, theirs in zip(dynamic_quantize_per_token.reference(x), node.outputs, strict=True):
                np.testing.assert_array_equal(ours, found[theirs.name])
    for node in products:
        a, a_scale, zero_point, b, b_scale = (
            found[value.name] if value.name in found else arrays[value.name] for value in node.inputs
        )
        block = node.attributes["block_size"].as_int()
        exact = w4a8_matmul.reference(a, a_scale, int(zero_point), b.astype(np.int8), b_scale, block)
        np.testing.assert_allclose(
            found[node.outputs[0].name], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max(), err_msg=node.name
        )


def test_weights_in_the_file_are_the_rounded_ones() -> None:
    """Layers that no scale touches: integers and scales are those of the float weight, negative nibbles included."""
    result = converted("llama", families.DYNAMO, weights__grid="signed8")
    arrays = constants(load_model(result.path))
    layers = {layer.name: layer for layer in find_linears(load_model(result.tiny.path)).layers}
    unscaled = [r for r in result.report.layers if r.label.startswith("block.0") and r.scheme != "float"]
    assert len(unscaled) == 7
    for layer in unscaled:
        wanted = quantize_weight(layers[layer.name].weight_array(), 32, "signed8", np.float32)
        np.testing.assert_array_equal(arrays[f"{layer.name}.weight_int4"].astype(np.int8), wanted.q)
        np.testing.assert_array_equal(arrays[f"{layer.name}.weight_scale"], wanted.scale)
        assert wanted.q.min() == -8


def test_layers_without_a_decision_stay(tmp_path: Path) -> None:
    model = parse(
        tmp_path,
        "(float[B, S, 24] X) => (float[B, S, 10] Y, float[B, S, 10] Z)",
        "Y = MatMul(X, w1)\nZ = MatMul(X, w2)",
        {"w1": weight(seed=1), "w2": weight(seed=2)},
    )
    first, second = find_linears(model).layers
    before = values(model, ["Y", "Z"], {"X": tokens()})
    assert _quantize(model, STATIC, first.name) == [first.name]
    after = values(model, ["Y", "Z"], {"X": tokens()})
    np.testing.assert_array_equal(after["Z"], before["Z"])
    assert not np.array_equal(after["Y"], before["Y"])
    assert second.node.op_type == "MatMul" and second.node.inputs[0].name == "X"
    np.testing.assert_array_equal(second.weight_array(), weight(seed=2))


def test_tied_embedding_stays_whole() -> None:
    """lm_head in int4 leaves the embedding that shares its matrix as it was."""
    result = converted("llama", families.DYNAMO, layers__lm_head="int4")
    (lm_head,) = (layer for layer in result.report.layers if layer.role == "lm_head")
    assert lm_head.scheme == "static" and lm_head.bytes_after < lm_head.bytes_before / 4
    before, after = (load_model(path) for path in (result.tiny.path, result.path))
    embedding = next(node.inputs[0].name for node in before.graph if node.op_type == "Gather")
    assert embedding == next(node.inputs[0].name for node in after.graph if node.op_type == "Gather")
    np.testing.assert_array_equal(constants(after)[embedding], constants(before)[embedding])
    assert next(n for n in after.graph if n.name == lm_head.name).op_type == "W4A8MatMul"


def test_activations_only(tmp_path: Path) -> None:
    """A float weight: the layer multiplies what the quantized activation stands for."""
    model = parse(tmp_path, "(float[B, S, 24] X) => (float[B, S, 10] Y)", "Y = MatMul(X, w)", {"w": weight()})
    _quantize(model, STATIC, weight=None)
    x = tokens()
    rounded = (_static(x, np.float32(STATIC.scale), 121).astype(np.float64) - 121) * STATIC.scale
    assert relative_error(values(model, ["Y"], {"X": x})["Y"], rounded @ weight().astype(np.float64)) < 1e-6
