"""Roles and labels come from topology: the same in every family, and blind to names."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx
import onnx.helper as oh
import pytest
from graph_tools import model_from_text

from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model

LLAMA = ["q", "k", "v", "o", "gate", "up", "down"]
ENCODER = ["q", "k", "v", "o", "fc1", "fc2"]
RNG = np.random.default_rng(2)


def _labels(path: Path) -> list[str]:
    return [layer.label for layer in find_linears(load_model(path)).layers]


def _unpacked(labels: list[str]) -> list[str]:
    return [
        part for label in labels for part in ([label[:-3] + p for p in "qkv"] if label.endswith("qkv") else [label])
    ]


def _blocks(parts: list[str], blocks: int = families.BLOCKS) -> list[str]:
    return [f"block.{block}.{part}" for block in range(blocks) for part in parts]


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "qwen2"])
def test_labels_are_the_same_in_every_family(architecture: str) -> None:
    for name, family in families.ALL_MODELS:
        if name == architecture:
            assert _unpacked(_labels(families.model(name, family).path)) == [*_blocks(LLAMA), "lm_head"]


def test_other_architectures() -> None:
    gpt2 = [*_blocks(["qkv", "o", "fc1", "fc2"]), "lm_head"]
    assert _labels(families.model("gpt2", families.DYNAMO).path) == gpt2
    assert _labels(families.model("gpt2", families.DYNAMO_KV).path) == gpt2
    assert _labels(families.model("bert", families.DYNAMO).path) == [*_blocks(ENCODER), "other.0", "lm_head"]
    assert _labels(families.model("bert-classifier", families.DYNAMO).path) == [*_blocks(ENCODER), "other.0", "other.1"]


def test_names_do_not_matter(tiny_model: families.TinyModel) -> None:
    """Every name but those of the graph's inputs and outputs is replaced by a random one."""
    model = load_model(tiny_model.path)
    before = [layer.label for layer in find_linears(model).layers]
    numbers = iter(RNG.permutation(100_000))
    for value in list(model.graph.initializers.values()):
        value.name = f"x{next(numbers)}"
    for node in model.graph:
        node.name = f"x{next(numbers)}"
        for output in node.outputs:
            if not output.is_graph_output():
                output.name = f"x{next(numbers)}"
    assert [layer.label for layer in find_linears(model).layers] == before


def _weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _text_labels(
    tmp_path: Path, body: str, weights: dict[str, np.ndarray], outputs: str = "float[1, 3, n] y"
) -> list[str]:
    model = model_from_text(tmp_path, f"(float[1, 3, 8] x) => ({outputs})", body, weights)
    return [layer.label for layer in find_linears(model).layers]


ATTENTION = """
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    kt = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul(q, kt)
    p = Softmax(s)
    a = MatMul(p, v)
"""
SQUARES = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8)}


def test_parallel_attention_and_feed_forward(tmp_path: Path) -> None:
    """GPT-J, Phi and Falcon add both branches at once; both belong to one block, in either order."""
    feed_forward = "f = MatMul(x, w1)\n g = Gelu(f)\n d = MatMul(g, w2)\n"
    ends = "o = MatMul(a, wo)\n t = Add(o, d)\n y = Add(t, x)"
    weights = _weights(**SQUARES, w1=(8, 32), w2=(32, 8))
    attention = ["block.0.q", "block.0.k", "block.0.v"]
    assert _text_labels(tmp_path, ATTENTION + feed_forward + ends, weights) == [
        *attention, "block.0.fc1", "block.0.fc2", "block.0.o",
    ]  # fmt: skip
    assert _text_labels(tmp_path, feed_forward + ATTENTION + ends, weights)[:2] == ["block.0.fc1", "block.0.fc2"]


@pytest.mark.parametrize("product", ["Mul(g, e)", "Mul(e, g)"])
def test_gate_is_the_factor_behind_the_activation(tmp_path: Path, product: str) -> None:
    body = f"""{ATTENTION}
        o = MatMul(a, wo)
        h = Add(o, x)
        e = MatMul(h, w1)
        f = MatMul(h, w2)
        g = Gelu(f)
        m = {product}
        d = MatMul(m, wd)
        y = Add(d, h)"""
    labels = _text_labels(tmp_path, body, _weights(**SQUARES, w1=(8, 16), w2=(8, 16), wd=(16, 8)))
    assert labels[-3:] == ["block.0.up", "block.0.gate", "block.0.down"]


def test_packed_gate_up(tmp_path: Path) -> None:
    body = (
        ATTENTION
        + """
        o = MatMul(a, wo)
        h = Add(o, x)
        f = MatMul(h, w1)
        g, u = Split <axis = -1, num_outputs = 2> (f)
        c = Sigmoid(g)
        t = Mul(g, c)
        m = Mul(t, u)
        d = MatMul(m, wd)
        y = Add(d, h)"""
    )
    assert _text_labels(tmp_path, body, _weights(**SQUARES, w1=(8, 32), wd=(16, 8)))[-2:] == [
        "block.0.gate_up",
        "block.0.down",
    ]


def test_shared_key_value_projection(tmp_path: Path) -> None:
    body = """
        q = MatMul(x, wq)
        b = MatMul(x, wkv)
        k, v = Split <axis = -1, num_outputs = 2> (b)
        kt = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul(q, kt)
        p = Softmax(s)
        a = MatMul(p, v)
        o = MatMul(a, wo)
        y = Add(o, x)"""
    weights = _weights(wq=(8, 8), wkv=(8, 16), wo=(8, 8))
    assert _text_labels(tmp_path, body, weights) == ["block.0.q", "block.0.kv", "block.0.o"]


def test_two_layers_with_one_role_get_different_labels(tmp_path: Path) -> None:
    """A low-rank adapter beside the query projection."""
    body = """
        q0 = MatMul(x, wq)
        l = MatMul(x, la)
        q1 = MatMul(l, lb)
        q = Add(q0, q1)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        kt = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul(q, kt)
        p = Softmax(s)
        a = MatMul(p, v)
        o = MatMul(a, wo)
        y = Add(o, x)"""
    labels = _text_labels(tmp_path, body, _weights(**SQUARES, la=(8, 2), lb=(2, 8)))
    assert labels == ["block.0.q", "other.0", "block.0.q.1", "block.0.k", "block.0.v", "block.0.o"]


def test_rotation_by_tables_is_no_residual_addition(tmp_path: Path) -> None:
    """Cosines and sines gathered from tables look like embeddings; q cos + rotated q sin must not end the query."""
    rotate = "c = Gather(cos, pos)\n s0 = Gather(sin, pos)\n"
    for part in "qk":
        rotate += f"{part}0 = MatMul(x, w{part})\n n{part} = Neg({part}0)\n {part}c = Mul({part}0, c)\n"
        rotate += f"{part}s = Mul(n{part}, s0)\n {part} = Add({part}c, {part}s)\n"
    body = rotate + ATTENTION.replace("q = MatMul(x, wq)", "").replace("k = MatMul(x, wk)", "")
    body += "o = MatMul(a, wo)\n y = Add(o, x)"
    weights = _weights(**SQUARES, cos=(16, 8), sin=(16, 8))
    signature = "(float[1, 3, 8] x, int64[1, 3] pos) => (float[1, 3, 8] y)"
    model = model_from_text(tmp_path, signature, body, weights)
    labels = [layer.label for layer in find_linears(model).layers]
    assert labels == ["block.0.q", "block.0.k", "block.0.v", "block.0.o"]


def test_layers_outside_a_transformer_are_other(tmp_path: Path) -> None:
    body = "h = MatMul(x, w1)\n g = Gelu(h)\n y = MatMul(g, w2)"
    assert _text_labels(tmp_path, body, _weights(w1=(8, 32), w2=(32, 4))) == ["other.0", "other.1"]


def test_lm_head_needs_one_column_per_vocabulary_entry(tmp_path: Path) -> None:
    """A pooler or classifier reaches an output too."""
    graph = oh.make_graph(
        [
            oh.make_node("Gather", ["table", "ids"], ["e"]),
            oh.make_node("MatMul", ["e", "head"], ["scores"]),
            oh.make_node("MatMul", ["e", "pool"], ["pooled"]),
            oh.make_node("MatMul", ["e", "wide"], ["logits"]),
        ],
        "g",
        [oh.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, 3])],
        [
            oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, None])
            for name in ("scores", "pooled", "logits")
        ],
        [
            onnx.numpy_helper.from_array(a, n)
            for n, a in _weights(table=(20, 8), head=(8, 20), pool=(8, 8), wide=(8, 24)).items()
        ],
    )
    path = tmp_path / "m.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10), path)
    assert _labels(path) == ["lm_head", "other.0", "lm_head.1"]
