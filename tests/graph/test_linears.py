"""Linear layers, their weights and biases, and a reason for everything that is none."""

from __future__ import annotations

from pathlib import Path

import families
import ml_dtypes
import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from graph_tools import model_from_text, run

from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.roles import Role

RNG = np.random.default_rng(5)
W = RNG.normal(size=(8, 6)).astype(np.float32)
BIAS = RNG.normal(size=6).astype(np.float32)
X = {"x": RNG.normal(size=(4, 8)).astype(np.float32)}
SIGNATURE = "(float[4, 8] x) => (float[4, n] y)"


def _layers(
    tmp_path: Path, body: str, signature: str = SIGNATURE, **weights: np.ndarray
) -> tuple[ir.Model, list[LinearLayer]]:
    model = model_from_text(tmp_path, signature, body, weights)
    return model, find_linears(model).layers


def _agrees(model: ir.Model, layer: LinearLayer, tmp_path: Path) -> None:
    """X W + b from the arrays is what the runtime computes."""
    results = run(model, X, tmp_path, [layer.activation, layer.output])
    product = results[layer.activation.name].astype(np.float64) @ layer.weight_array()
    bias = layer.bias_array()
    wanted = product if bias is None else product + bias
    np.testing.assert_allclose(results[layer.output.name], wanted, rtol=1e-5, atol=1e-5)
    assert layer.weight_array().shape == (layer.k, layer.n)
    assert layer.weight_array().dtype == np.float32


# ---- the export families -------------------------------------------------------------------------------------------


def test_every_layer_of_every_family(tiny_model: families.TinyModel, tmp_path: Path) -> None:
    """The arrays of every layer reproduce the runtime's output of that layer."""
    model = load_model(tiny_model.path)
    search = find_linears(model)
    per_block = {"gpt2": 4, "bert": 6, "bert-classifier": 6}.get(tiny_model.architecture, 7)
    packed = 2 if tiny_model.family.startswith("genai") else 0
    outside = 2 if tiny_model.architecture.startswith("bert") else 1
    assert len(search.layers) == tiny_model.blocks * (per_block - packed) + outside
    assert len({layer.label for layer in search.layers}) == len(search.layers)
    assert len({layer.name for layer in search.layers}) == len(search.layers)
    values = [value for layer in search.layers for value in (layer.activation, layer.output)]
    results = run(model, tiny_model.feeds(tiny_model.token_ids(length=4)), tmp_path, values)
    tolerance = 5e-3 if tiny_model.dtype == "float16" else 1e-4
    for layer in search.layers:
        bias = layer.bias_array()
        wanted = results[layer.activation.name].astype(np.float64) @ layer.weight_array()
        wanted = wanted if bias is None else wanted + bias
        error = np.abs(results[layer.output.name] - wanted).max()
        assert error <= tolerance * np.abs(wanted).max(), layer.label


def test_activation_products_are_skipped_with_that_reason(tiny_model: families.TinyModel) -> None:
    search = find_linears(load_model(tiny_model.path))
    fused = tiny_model.family.startswith("genai")
    assert len(search.skipped) == (0 if fused else 2 * tiny_model.blocks)
    assert {skipped.reason for skipped in search.skipped} <= {"both operands are activations"}
    assert all(skipped.node_name for skipped in search.skipped)


def test_weights_are_the_same_in_every_family() -> None:
    """The same checkpoint, so the same arrays under the same labels; q, k and v side by side in qkv."""
    reference = find_linears(load_model(families.model("qwen2", families.DYNAMO).path)).by_label()
    for family in families.LLAMA_FAMILIES[1:]:
        found = find_linears(load_model(families.model("qwen2", family).path)).by_label()
        tolerance = 1e-3 if family == families.GENAI_FP16 else 0
        for label, layer in found.items():
            parts = (
                [reference[label.removesuffix("qkv") + part] for part in "qkv"]
                if label.endswith("qkv")
                else [reference[label]]
            )
            weight = np.concatenate([part.weight_array() for part in parts], axis=1)
            np.testing.assert_allclose(layer.weight_array(), weight, rtol=tolerance, atol=tolerance)
            if parts[0].bias is not None:
                bias = np.concatenate([part.bias_array() for part in parts])
                np.testing.assert_allclose(layer.bias_array(), bias, rtol=tolerance, atol=tolerance)


def test_tied_lm_head_is_found_and_says_so() -> None:
    for family in families.LLAMA_FAMILIES:
        (head,) = (
            x for x in find_linears(load_model(families.model("llama", family).path)).layers if x.role is Role.LM_HEAD
        )
        assert (head.k, head.n) == (families.HIDDEN, families.VOCABULARY)
        assert len(head.weight.uses()) == 2  # the embedding reads it too


# ---- weights through other nodes -----------------------------------------------------------------------------------


def test_plain_matmul_with_bias(tmp_path: Path) -> None:
    model, (layer,) = _layers(tmp_path, "h = MatMul(x, w)\n y = Add(bias, h)", w=W, bias=BIAS)
    assert (layer.weight.name, layer.weight_path) == ("w", ())
    assert (layer.bias.name, layer.bias_node.op_type) == ("bias", "Add")
    _agrees(model, layer, tmp_path)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
def test_gemm(tmp_path: Path, transposed: int, alpha: float, beta: float, shape: tuple[int, ...]) -> None:
    stored = W.T.copy() if transposed else W
    bias = np.full(shape, 0.75, np.float32) if np.prod(shape) == 1 else BIAS.reshape(shape)
    body = f"y = Gemm <transB = {transposed}, alpha = {alpha}, beta = {beta}> (x, w, bias)"
    model, (layer,) = _layers(tmp_path, body, w=stored, bias=bias)
    assert (layer.k, layer.n, layer.bias_node) == (8, 6, None)
    _agrees(model, layer, tmp_path)


def test_gemm_without_bias(tmp_path: Path) -> None:
    model, (layer,) = _layers(tmp_path, "y = Gemm(x, w)", w=W)
    assert layer.bias is layer.bias_node is layer.bias_array() is None
    _agrees(model, layer, tmp_path)


@pytest.mark.parametrize(
    ("path", "stored", "length"),
    [
        ("v = Transpose <perm = [1, 0]> (w)", W.T.copy(), 1),
        ("v = Transpose(w)", W.T.copy(), 1),
        ("v = Identity(w)", W, 1),
        ("v = Cast <to = 1> (w)", W.astype(np.float16), 1),
        ("v = Cast <to = 1> (w)", W.astype(ml_dtypes.bfloat16), 1),
        ("a = Identity(w)\n b = Cast <to = 1> (a)\n v = Transpose <perm = [1, 0]> (b)", W.T.astype(np.float16), 3),
    ],
)
def test_weight_through_other_nodes(tmp_path: Path, path: str, stored: np.ndarray, length: int) -> None:
    model, (layer,) = _layers(tmp_path, f"{path}\n y = MatMul(x, v)", w=stored)
    assert layer.weight.name == "w"
    assert len(layer.weight_path) == length
    assert layer.weight_path[-1].outputs[0] is layer.node.inputs[1]
    _agrees(model, layer, tmp_path)


@pytest.mark.parametrize(
    ("scale", "zero", "attributes"),
    [
        (np.float32(0.02), np.int8(3), ""),
        (RNG.uniform(0.01, 0.03, 6).astype(np.float32), RNG.integers(-5, 5, 6).astype(np.int8), "<axis = 1>"),
        (RNG.uniform(0.01, 0.03, 8).astype(np.float32), RNG.integers(-5, 5, 8).astype(np.int8), "<axis = 0>"),
        (
            RNG.uniform(0.01, 0.03, (2, 6)).astype(np.float32),
            RNG.integers(-5, 5, (2, 6)).astype(np.int8),
            "<axis = 0, block_size = 4>",
        ),
    ],
)
def test_quantized_weight_is_dequantized(tmp_path: Path, scale: np.ndarray, zero: np.ndarray, attributes: str) -> None:
    stored = RNG.integers(-128, 128, (8, 6)).astype(np.int8)
    body = f"v = DequantizeLinear {attributes} (w, s, z)\n y = MatMul(x, v)"
    model, (layer,) = _layers(tmp_path, body, w=stored, s=np.asarray(scale), z=np.asarray(zero))
    assert layer.weight.name == "w"
    _agrees(model, layer, tmp_path)


def test_weight_shared_by_two_nodes_gives_two_layers(tmp_path: Path) -> None:
    _, layers = _layers(tmp_path, "a = MatMul(x, w)\n b = MatMul(x, w)\n y = Add(a, b)", w=W)
    assert [layer.weight.name for layer in layers] == ["w", "w"]


def test_weight_array_is_fresh_and_follows_the_graph(tmp_path: Path) -> None:
    model, (layer,) = _layers(tmp_path, "y = MatMul(x, w)", w=W)
    layer.weight_array()[:] = 0
    np.testing.assert_array_equal(layer.weight_array(), W)
    model.graph.initializers["w"].const_value = ir.tensor(2 * W, name="w")
    np.testing.assert_array_equal(layer.weight_array(), 2 * W)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w)\n y = Add(h, x6)",  # not constant
        "h = MatMul(x, w)\n y = Add(h, one)",  # a scalar, not a bias vector
        "h = MatMul(x, w)\n y = Add(h, bias)\n z = Relu(h)",  # the product is read without the bias too
    ],
)
def test_what_is_no_bias(tmp_path: Path, body: str) -> None:
    signature = "(float[4, 8] x, float[4, 6] x6) => (float[4, n] y" + (", float[4, m] z)" if "z =" in body else ")")
    extra = {"one": np.ones(1, np.float32)} if "one" in body else {"bias": BIAS} if "bias" in body else {}
    _, (layer,) = _layers(tmp_path, body, signature, w=W, **extra)
    assert layer.bias is None
    assert layer.bias_node is None


# ---- everything else is skipped with a reason ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, k)", "its right operand k is a graph input, so its values are not known"),
        ("t = Transpose(x)\n y = MatMul(x, t)", "both operands are activations"),
        ("y = MatMul(left, x)", "its constant operand is on the left"),
        ("y = MatMul(x, cube)", "its weight cube has shape [2, 8, 6], not [K, N]"),
        ("y = MatMul(x, vector)", "its weight vector has shape [8], not [K, N]"),
        ("c = MatMul(left, w48)\n y = Add(c, c)", "both operands are constant"),
        ("y = Gemm <transA = 1> (x, w48)", "it transposes its activation (transA)"),
        ("y = Gemm(x, w, k6)", "it adds a computed value (input C), not a constant bias"),
        ("y = Gemm(x, w, plane)", "its bias plane has shape [4, 6], not [N]"),
        ("y = Gemm(x, w, column)", "its bias column has shape [4, 1], not [N]"),
        (
            "r = Reshape(flat, shape)\n y = MatMul(x, r)",
            "its weight comes through a Reshape node, which is not followed",
        ),
        (
            "c = Cast <to = 11> (x)\n y = MatMul(c, double)",
            "its weight double is double, not float32, float16 or bfloat16",
        ),
        ("y = MatMul(x, empty)", "its weight empty is empty"),
    ],
)
def test_skipped(tmp_path: Path, body: str, reason: str) -> None:
    weights = {
        "left": RNG.normal(size=(3, 4)).astype(np.float32),
        "w": W,
        "w48": RNG.normal(size=(4, 8)).astype(np.float32),
        "cube": RNG.normal(size=(2, 8, 6)).astype(np.float32),
        "vector": RNG.normal(size=8).astype(np.float32),
        "plane": RNG.normal(size=(4, 6)).astype(np.float32),
        "column": RNG.normal(size=(4, 1)).astype(np.float32),
        "flat": W.reshape(-1),
        "shape": np.array([8, 6]),
        "double": W.astype(np.float64),
        "empty": np.zeros((8, 0), np.float32),
    }
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    model = model_from_text(
        tmp_path,
        "(float[4, 8] x, float[8, 6] k, float[4, 6] k6) => (float[4, n] y)",
        body,
        {name: array for name, array in weights.items() if name in words},
    )
    search = find_linears(model)
    assert search.layers == []
    (skipped,) = search.skipped
    assert skipped.reason == reason
    assert skipped.op_type in ("MatMul", "Gemm")


def test_layers_in_subgraphs_and_functions_are_skipped(tmp_path: Path) -> None:
    value = oh.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    branch = oh.make_graph([oh.make_node("MatMul", ["x", "w"], ["z"], name="inner")], "branch", [], [value])
    nodes = [
        oh.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.array(True))),
        oh.make_node("If", ["c"], ["a"], name="choice", then_branch=branch, else_branch=branch),
        oh.make_node("Project", ["a", "v"], ["y"], domain="local", name="call"),
    ]
    function = oh.make_function(
        "local",
        "Project",
        ["p", "q"],
        ["r"],
        [oh.make_node("MatMul", ["p", "q"], ["r"], name="mm")],
        [oh.make_opsetid("", 21)],
    )
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 8])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(W, "w"), onnx.numpy_helper.from_array(W.T.copy(), "v")],
    )
    imports = [oh.make_opsetid("", 21), oh.make_opsetid("local", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(oh.make_model(graph, opset_imports=imports, functions=[function], ir_version=10), path)
    search = find_linears(load_model(path))
    assert search.layers == []
    reasons = [skipped.reason for skipped in search.skipped]
    assert reasons[:2] == ["it is inside the If node choice"] * 2
    assert reasons[2].startswith("it is inside the function local.Project")


def test_operators_that_hold_weights_of_their_own_are_named(tmp_path: Path) -> None:
    body = """
        q = com.microsoft.MatMulNBits <K = 8, N = 6, bits = 4, block_size = 16> (x, packed, scales)
        y = com.microsoft.FusedMatMul <transB = 1> (x, w)"""
    weights = {
        "packed": np.zeros((6, 1, 8), np.uint8),
        "scales": np.ones(6, np.float32),
        "w": W.T.copy(),
    }
    search = find_linears(model_from_text(tmp_path, SIGNATURE, body, weights))
    assert [skipped.op_type for skipped in search.skipped] == ["MatMulNBits", "FusedMatMul"]
    assert search.skipped[0].reason == "it is already quantized"


def test_overridable_initializer_is_no_constant(tmp_path: Path) -> None:
    proto = oh.make_model(
        oh.make_graph(
            [oh.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
            "g",
            [
                oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
                for name, shape in (("x", [4, 8]), ("w", [8, 6]))
            ],
            [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 6])],
            [onnx.numpy_helper.from_array(W, "w")],
        ),
        opset_imports=[oh.make_opsetid("", 21)],
        ir_version=10,
    )
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    assert "w is a graph input" in find_linears(load_model(path)).skipped[0].reason
    proto.ir_version = 3  # where every initializer had to be an input as well
    onnx.save(proto, path)
    assert [layer.name for layer in find_linears(load_model(path)).layers] == ["mm"]


def test_model_without_matrix_products(tmp_path: Path) -> None:
    search = find_linears(model_from_text(tmp_path, SIGNATURE, "y = Relu(x)", {}))
    assert (search.layers, search.skipped) == ([], [])
