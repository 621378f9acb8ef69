"""A per-token quantization goes into the product that alone reads it, and not a byte of the results changes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import families
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conversions import EXACT, converted, recipe, values

import fptq_onnx
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.ops import BODY_OPSET, DOMAIN, VERSION
from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.fuse_dynamic_matmul import FuseDynamicMatMulPass
from fptq_onnx.passes.fuse_quantize import FuseQuantizePass

BLOCKS = families.BLOCKS
FUSED = "DynamicQuantizeW4A8MatMul"
SEPARATE = {"DynamicQuantizePerToken": 1, "W4A8MatMul": 1}

QUANTIZE = "a, s = fptq.DynamicQuantizePerToken(x)\n"
PRODUCT = "y = fptq.W4A8MatMul<block_size = 4, scale_max_multiple = 0>(a, s, zero, b, scale)"
BOTH = QUANTIZE + PRODUCT
CONSTANTS = {
    "zero": np.array(128, np.uint8),
    "zero_of_one": np.array([128], np.uint8),
    "other_zero": np.array(127, np.uint8),
    "one_scale": np.array(0.05, np.float32),
    "scale": np.linspace(0.1, 0.4, 4, dtype=np.float32).reshape(2, 2),
}


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _fused(path: Path) -> tuple[ir.Model, ir.Model]:
    """What `convert --fuse` makes of a model, without and with the pass under test."""
    before, after = load_model(path), load_model(path)
    for model in (before, after):
        FuseQuantizePass()(model)
    assert FuseDynamicMatMulPass()(after).modified
    for model in (before, after):
        AddFunctionsPass()(model)
    return before, after


@pytest.mark.parametrize(
    ("architecture", "family", "scales"),
    [
        ("llama", families.DYNAMO, "float"),
        ("llama", families.GENAI_FP16, "float"),
        ("gpt2", families.DYNAMO, "float"),
        ("gpt2", families.DYNAMO, "integer"),
    ],
)
def test_results_keep_their_bytes(architecture: str, family: str, scales: str, tmp_path: Path) -> None:
    """In a Llama what attention's output projection reads; in GPT-2, whose LayerNorms are no partners, everything."""
    result = converted(architecture, family, activations__scheme="per-token", weights__scales=scales)
    separate, fused = _fused(result.path)
    before, after = _operators(separate), _operators(fused)
    count = after[FUSED]
    assert count == before["DynamicQuantizePerToken"] - after["DynamicQuantizePerToken"]
    assert count == before["W4A8MatMul"] - after["W4A8MatMul"]
    assert count == (BLOCKS if architecture == "llama" else 4 * BLOCKS)
    assert not after["DynamicQuantizePerToken"]
    feeds = result.tiny.feeds(result.tiny.token_ids())
    names = [str(output.name) for output in fused.graph.outputs]
    for name, value in values(fused, names, feeds).items():
        np.testing.assert_array_equal(value, values(separate, [name], feeds)[name])

    # The layers kept their names and so their labels; bodies are in the file.
    assert {node.name for node in fused.graph if node.op_type == FUSED} <= {
        layer.name for layer in result.report.layers
    }
    path = tmp_path / "fused.onnx"
    save_model(fused, path)
    if family == families.DYNAMO:  # the checker refuses functions of opset 21 in models of 22 for some operators
        onnx.checker.check_model(path, full_check=True)
    if architecture == "gpt2" and scales == "integer":  # integers in the bodies too
        opened = fptq_onnx.session(path, register_library=False, threads=1, config=EXACT)
        for name, value in zip(names, opened.run(names, feeds), strict=True):
            np.testing.assert_array_equal(value, values(separate, [name], feeds)[name])
    assert not FuseDynamicMatMulPass()(fused).modified
    reasons = [skipped.reason for skipped in find_linears(fused).skipped if skipped.op_type == FUSED]
    assert reasons == ["it is already quantized"] * count


def _model(tmp_path: Path, body: str, outputs: str, inputs: str = "float[B, 4, 8] x") -> ir.Model:
    opsets = f'opset_import: ["" : {BODY_OPSET}, "{DOMAIN}" : {VERSION}]'
    words = body.replace(",", " ").replace(")", " ").split()
    used = [ir.tensor(array, name=name) for name, array in CONSTANTS.items() if name in words and name not in inputs]
    packed = np.arange(8, dtype=np.uint8) * 37
    used.append(ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape([8, 2]), name="b"))
    text = f"<ir_version: 10, {opsets}>\nmain ({inputs}) => ({outputs}) {{\n{body}\n}}"
    ir.save(ir.from_onnx_text(text, initializers=used), tmp_path / "text.onnx")
    return load_model(tmp_path / "text.onnx")


@pytest.mark.parametrize(
    ("body", "outputs", "expected"),
    [
        (BOTH, "float[B, 4, 2] y", {FUSED: 1}),
        (BOTH.replace("zero", "zero_of_one"), "float[B, 4, 2] y", {FUSED: 1}),
        (f"{BOTH}\nz = Neg(y)", "float[B, 4, 2] z", {FUSED: 1, "Neg": 1}),
        (
            f"{BOTH}\n{PRODUCT.replace('y =', 'z =')}",
            "float[B, 4, 2] y, float[B, 4, 2] z",
            {"DynamicQuantizePerToken": 1, "W4A8MatMul": 2},
        ),
        (f"{BOTH}\nz = Neg(s)", "float[B, 4, 2] y, float[B, 4, 1] z", {**SEPARATE, "Neg": 1}),
        (f"{BOTH}\nz = Identity(a)", "float[B, 4, 2] y, uint8[B, 4, 8] z", {**SEPARATE, "Identity": 1}),
        (BOTH, "float[B, 4, 2] y, uint8[B, 4, 8] a", SEPARATE),
        (BOTH, "float[B, 4, 2] y, float[B, 4, 1] s", SEPARATE),
        (BOTH.replace("zero", "other_zero"), "float[B, 4, 2] y", SEPARATE),
        (BOTH.replace("(a, s, zero", "(a, one_scale, zero"), "float[B, 4, 2] y", SEPARATE),
        (
            f"a = QuantizeLinear(x, one_scale, zero)\n{PRODUCT.replace('s, zero', 'one_scale, zero')}",
            "float[B, 4, 2] y",
            {"QuantizeLinear": 1, "W4A8MatMul": 1},
        ),
        (
            f"h = Cast<to = 10>(x)\n{BOTH.replace('PerToken(x)', 'PerToken(h)')}",
            "float[B, 4, 2] y",
            {**SEPARATE, "Cast": 1},
        ),
    ],
    ids=[
        "fused",
        "zero-point-of-one-element",
        "further-node",
        "two-products",
        "scale-read-elsewhere",
        "values-read-elsewhere",
        "values-are-an-output",
        "scale-is-an-output",
        "other-zero-point",
        "other-scale",
        "static",
        "other-type",
    ],
)
def test_what_is_fused(body: str, outputs: str, expected: dict[str, int], tmp_path: Path) -> None:
    model, separate = _model(tmp_path, body, outputs), _model(tmp_path, body, outputs)
    assert FuseDynamicMatMulPass()(model).modified == (FUSED in expected)
    assert _operators(model) == expected
    for each in (model, separate):
        AddFunctionsPass()(each)
    names = [str(output.name) for output in separate.graph.outputs]
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)}
    one, other = values(model, names, feeds), values(separate, names, feeds)
    for name in names:
        np.testing.assert_array_equal(one[name], other[name])


def test_zero_point_that_may_change_is_not_fused(tmp_path: Path) -> None:
    model = _model(tmp_path, BOTH, "float[B, 4, 2] y", "float[B, 4, 8] x, uint8 zero")
    assert not FuseDynamicMatMulPass()(model).modified
    assert _operators(model) == SEPARATE


@pytest.mark.parametrize(("architecture", "family"), [("llama", families.DYNAMO_KV), ("gpt2", families.DYNAMO)])
def test_convert_fuses_on_request(architecture: str, family: str, tmp_path: Path) -> None:
    """The same results: of GPT-2 to the byte, of a Llama but for values on a rounding border of a fused norm."""
    tiny = families.model(architecture, family)
    chosen = recipe(activations__scheme="per-token")
    outputs = {}
    for fuse in (True, False):
        path = tmp_path / f"{fuse}.onnx"
        report = fptq_onnx.convert(tiny.path, path, recipe=chosen, fuse=fuse, verify_tokens=24)
        operators = _operators(load_model(path))
        assert operators[FUSED] == (0 if not fuse else BLOCKS if architecture == "llama" else 4 * BLOCKS)
        assert not (fuse and operators["DynamicQuantizePerToken"])
        assert report.verification is not None
        assert {layer["bytes_after"] for layer in json.loads(path.with_suffix(".json").read_text())["layers"]} - {None}
        opened = fptq_onnx.session(path, threads=1)
        outputs[fuse] = opened.run(["logits"], tiny.feeds(tiny.token_ids()))[0]
    if architecture == "gpt2":
        np.testing.assert_array_equal(outputs[True], outputs[False])
    else:
        size = np.abs(outputs[False]).max()
        np.testing.assert_allclose(outputs[True], outputs[False], rtol=0, atol=0.05 * size)


def test_head_and_embedding_share_a_table_with_a_fused_head(tmp_path: Path) -> None:
    """The head of GPT-2 reads a LayerNorm, so its per-token quantization goes into the head."""
    tiny = families.model("gpt2", families.DYNAMO)
    chosen = recipe(
        activations__scheme="per-token", layers__lm_head="int4", layers__embedding="int4", weights__grid="signed8"
    )
    outputs = []
    for fuse in (True, False):
        path = tmp_path / f"{fuse}.onnx"
        report = fptq_onnx.convert(tiny.path, path, recipe=chosen, fuse=fuse, verify_tokens=0)
        assert report.embedding == "int4, one table with the head"
        assert _operators(load_model(path))[FUSED] == fuse * (4 * BLOCKS + 1)
        outputs.append(fptq_onnx.session(path, threads=1).run(["logits"], tiny.feeds(tiny.token_ids()))[0])
    np.testing.assert_array_equal(*outputs)
