"""The other output formats: standard operators, and onnxruntime's own int4 op."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest
from conversions import constants, converted, relative_error, values
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_models import parse, tokens, weight

from fptq_onnx.errors import RecipeError
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.passes.replace_linears import LayerQuantization, PerTokenQuantizer
from fptq_onnx.passes.to_matmulnbits import ToMatMulNBitsPass
from fptq_onnx.quantization.int4 import Grid, QuantizedWeight, quantize_weight

PRODUCTS = ("MatMul", "Gemm", "W4A8MatMul", "MatMulNBits")


def _dequantized(model: ir.Model, name: str, q: QuantizedWeight) -> np.ndarray:
    """The weight [K, N] that a MatMulNBits node stands for, from its documented layout."""
    node = next(node for node in model.graph if node.name == name)
    k, n, block = (node.attributes[key].as_int() for key in ("K", "N", "block_size"))
    packed, scale = (node.inputs[index].const_value.numpy() for index in (1, 2))
    assert (k, n) == q.q.shape and packed.shape == (n, -(-k // block), block // 2) and packed.dtype == np.uint8
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, -1, block).astype(np.float32) - 8
    return (nibbles * scale.reshape(n, -1, 1)).reshape(n, -1)[:, :k].T


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 200),
    n=st.integers(1, 12),
    group=st.sampled_from([16, 32, 64, 128]),
    grid=st.sampled_from(["absmax7", "signed8", "mse_clip"]),
    seed=st.integers(0, 2**16),
)
def test_matmulnbits_round_trip(
    k: int, n: int, group: int, grid: Grid, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any weight comes back from the packed layout as it was quantized, short last groups too."""
    w = np.random.default_rng(seed).standard_normal((k, n), dtype=np.float32)
    folder = tmp_path_factory.mktemp("round-trip")
    model = parse(folder, f"(float[B, {k}] X) => (float[B, {n}] Y)", "Y = MatMul(X, w)", {"w": w})
    (layer,) = find_linears(model).layers
    quantized = quantize_weight(w, group if k > group else k, grid, np.float32)
    ToMatMulNBitsPass({layer.name: LayerQuantization(PerTokenQuantizer(), lambda: quantized)})(model)
    np.testing.assert_array_equal(_dequantized(model, layer.name, quantized), quantized.dequantize())


@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32])
def test_qdq_agrees_with_the_kernels_without_any_custom_op(family: str) -> None:
    custom, qdq = converted("llama", family), converted("llama", family, "qdq")
    model = load_model(qdq.path)
    assert "fptq" not in model.opset_imports and not model.functions
    assert not [node for node in model.graph if node.domain == "fptq"]
    token_ids = custom.tiny.token_ids()
    assert relative_error(qdq.run(token_ids, library=False), custom.run(token_ids)) < 1e-4
    decided = [[(layer.label, layer.scheme, layer.range) for layer in c.report.layers] for c in (custom, qdq)]
    assert decided[0] == decided[1]


def test_matmulnbits_holds_the_same_weights() -> None:
    custom, nbits = converted("llama", families.DYNAMO), converted("llama", families.DYNAMO, "matmulnbits")
    ours, theirs = load_model(custom.path), load_model(nbits.path)
    arrays = constants(ours)
    assert "fptq" not in theirs.opset_imports
    quantized = [layer for layer in nbits.report.layers if layer.scheme != "float"]
    assert len(quantized) == 21
    for layer in quantized:
        integers, scale = arrays[f"{layer.name}.weight_int4"], arrays[f"{layer.name}.weight_scale"]
        q = QuantizedWeight(integers.astype(np.int8), scale, 32)
        np.testing.assert_array_equal(_dequantized(theirs, layer.name, q), q.dequantize())
    assert nbits.report.verification.kl_mean < custom.report.verification.kl_mean


@pytest.mark.parametrize("group", [16, 32, 72], ids=["short last group", "exact", "channel"])
def test_matmulnbits_computes_with_these_weights(tmp_path: Path, group: int) -> None:
    """In float (accuracy level 0) to rounding; negative scales and a K that fills no block included."""
    k = 72
    w = weight(k)
    model = parse(tmp_path, "(float[B, S, 72] X) => (float[B, S, 10] Y)", "Y = MatMul(X, w)", {"w": w})
    (layer,) = find_linears(model).layers
    q = quantize_weight(w, group, "signed8", np.float32)
    assert (q.scale < 0).any()
    ToMatMulNBitsPass({layer.name: LayerQuantization(PerTokenQuantizer(), lambda: q)})(model)
    np.testing.assert_array_equal(_dequantized(model, layer.name, q), q.dequantize())
    (node,) = (node for node in model.graph if node.op_type == "MatMulNBits")
    assert node.attributes["accuracy_level"].as_int() == 4
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    x = tokens(k)
    assert relative_error(values(model, ["Y"], {"X": x})["Y"], x @ q.dequantize()) < 1e-5


@pytest.mark.parametrize("group", [8, 24])
def test_matmulnbits_refuses_block_sizes_it_has_not(tmp_path: Path, group: int) -> None:
    model = parse(tmp_path, "(float[B, S, 72] X) => (float[B, S, 10] Y)", "Y = MatMul(X, w)", {"w": weight(72)})
    (layer,) = find_linears(model).layers
    decision = LayerQuantization(PerTokenQuantizer(), lambda: quantize_weight(weight(72), group, "absmax7", "f4"))
    with pytest.raises(RecipeError, match=rf"{layer.name}: MatMulNBits needs a block size .* not {group}\. Set"):
        ToMatMulNBitsPass({layer.name: decision})(model)
