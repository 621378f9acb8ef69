"""Rotated value heads must give the same logits, whatever way an exporter writes attention."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "graph"))
from graph_tools import model_from_text, run

from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.passes.rotate_heads import HeadRotation, RotateHeadsPass
from fptq_onnx.quantization.rotate import random_rotation


def _rotate(model: ir.Model, seed: int = 0) -> HeadRotation:
    rotate = RotateHeadsPass(seed)
    assert rotate(model).modified
    assert rotate.refused is None
    assert rotate.applied is not None
    return rotate.applied


def _assert_same(after: np.ndarray, before: np.ndarray, tolerance: float = 1e-4) -> None:
    expected = before.astype(np.float32)
    np.testing.assert_allclose(after.astype(np.float32), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_every_family_gives_the_same_logits(tiny_model: families.TinyModel, tmp_path: Path) -> None:
    model = load_model(tiny_model.path)
    feeds = tiny_model.feeds(tiny_model.token_ids())
    before = run(model, feeds, tmp_path)
    labels = [layer.label for layer in find_linears(model).layers]
    applied = _rotate(model)
    after = run(model, feeds, tmp_path)
    tolerance = 2e-2 if tiny_model.dtype == "float16" else 1e-4
    _assert_same(after["logits"], before["logits"], tolerance)
    assert applied.head_sizes == (tiny_model.head_size,)
    assert applied.readers == tuple(f"block.{block}.o" for block in range(tiny_model.blocks))
    assert applied.changes_cache is tiny_model.has_cache
    assert [layer.label for layer in find_linears(model).layers] == labels
    rotation = random_rotation(tiny_model.head_size, 0).matrix
    for name in before:
        if name.endswith(".key"):
            _assert_same(after[name], before[name], tolerance)
        elif name.endswith(".value"):  # [batch, heads, tokens, d]
            _assert_same(after[name], before[name].astype(np.float32) @ rotation, tolerance)


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32])
def test_the_rotated_model_decodes_with_its_own_cache(family: str, tmp_path: Path) -> None:
    tiny = families.model("qwen2", family)
    tokens = tiny.token_ids(batch=1, length=9)

    def decode(model: ir.Model) -> np.ndarray:
        first = run(model, tiny.feeds(tokens[:, :6]), tmp_path)
        following = tiny.feeds(tokens) | {"input_ids": tokens[:, 6:]}
        if "position_ids" in following:
            following["position_ids"] = following["position_ids"][:, 6:]
        past = [name for name in following if name.startswith("past_key_values")]
        following |= {name: first[name.replace("past_key_values", "present")] for name in past}
        return run(model, following, tmp_path)["logits"]

    model = load_model(tiny.path)
    before = decode(model)
    _rotate(model)
    _assert_same(decode(model), before)


def test_an_outlier_in_one_value_channel_is_spread_over_its_head(tmp_path: Path) -> None:
    tiny = families.model("llama", families.DYNAMO)

    def channels(rotated: bool) -> np.ndarray:
        model = load_model(tiny.path)
        if rotated:
            _rotate(model)
        value = find_linears(model).by_label()["block.1.o"].activation
        read = run(model, tiny.feeds(tiny.token_ids()), tmp_path, [value])[value.name]
        return np.abs(read).reshape(-1, read.shape[-1]).max(axis=0)

    before, after = channels(False), channels(True)
    assert before.max() / np.median(before) > 12
    assert after.max() < before.max() / 2.5


def test_same_seed_same_weights(tmp_path: Path) -> None:
    def rotated(seed: int, folder: str) -> tuple[bytes, bytes]:
        model = load_model(families.model("llama", families.GENAI_FP16).path)
        _rotate(model, seed)
        path = tmp_path / folder / "model.onnx"
        path.parent.mkdir()
        save_model(model, path)
        return path.read_bytes(), path.with_name("model.onnx.data").read_bytes()

    first = rotated(1, "a")
    assert rotated(1, "b") == first
    assert rotated(2, "c")[1] != first[1]


# ---- hand-built attentions -----------------------------------------------------------------------------------------

HIDDEN, HEADS, SIZE = 8, 2, 4
SIGNATURE = "(float[2, 3, 8] x) => (float[2, 3, 8] y)"
HEADER = 'ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]'


def _attention(tmp_path: Path, values: str, sums: str, **extra: np.ndarray) -> ir.Model:
    """One attention over x; ``values`` computes vh [2, heads, 3, d] from v, ``sums`` z [2, 3, 8] from t, the sums."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(HIDDEN, HIDDEN)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
    weights |= {"split": np.array([2, 3, HEADS, SIZE]), "merge": np.array([2, 3, HIDDEN])} | extra
    body = f"""
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        qs = Reshape(q, split)
        ks = Reshape(k, split)
        qh = Transpose <perm = [0, 2, 1, 3]> (qs)
        kt = Transpose <perm = [0, 2, 3, 1]> (ks)
        {values}
        scores = MatMul(qh, kt)
        p = Softmax <axis = -1> (scores)
        s = MatMul(p, vh)
        t = Transpose <perm = [0, 2, 1, 3]> (s)
        {sums}
        y = MatMul(z, wo)"""
    used = {name: array for name, array in weights.items() if re.search(rf"[(,] *{name} *[,)]", body)}
    return model_from_text(tmp_path, SIGNATURE, body, used, HEADER)


PLAIN = "vs = Reshape(v, split)\n vh = Transpose <perm = [0, 2, 1, 3]> (vs)"
MERGE = "z = Reshape(t, merge)"
VECTOR = np.linspace(0.5, 2, HIDDEN, dtype=np.float32)


@pytest.mark.parametrize(
    ("values", "sums", "extra"),
    [
        (PLAIN, MERGE, {}),
        (PLAIN.replace("(v,", "(b,").replace("vs", "b = Add(v, bias)\n vs", 1), MERGE, {"bias": VECTOR}),
        (PLAIN, "m = Reshape(t, merge)\n z = Add(m, bias)", {"bias": VECTOR}),
        (PLAIN, "m = Reshape(t, merge)\n z = Mul(m, half)", {"half": np.array(0.5, np.float32)}),
        # Channels of a head that lie apart: [d, heads] in the value projection.
        (
            "vs = Reshape(v, apart)\n vh = Transpose <perm = [0, 3, 1, 2]> (vs)",
            MERGE,
            {"apart": np.array([2, 3, SIZE, HEADS])},
        ),
        # ... and in the output projection.
        (PLAIN, "u = Transpose <perm = [0, 1, 3, 2]> (t)\n z = Reshape(u, merge)", {}),
    ],
    ids=["plain", "bias", "bias on the sums", "factor", "values apart", "sums apart"],
)
def test_layouts(values: str, sums: str, extra: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = _attention(tmp_path, values, sums, **extra)
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 3, HIDDEN)).astype(np.float32)}
    before = run(model, feeds, tmp_path)["y"]
    weight = find_linears(model).layers[2].weight_array()
    assert _rotate(model).head_sizes == (SIZE,)
    assert not np.allclose(find_linears(model).layers[2].weight_array(), weight)
    _assert_same(run(model, feeds, tmp_path)["y"], before, 1e-5)


@pytest.mark.parametrize(
    ("values", "sums", "reason"),
    [
        (PLAIN.replace("(v,", "(r,").replace("vs", "r = Relu(v)\n vs", 1), MERGE, "the Relu node .* treats every"),
        (PLAIN, "m = Reshape(t, merge)\n g = Sigmoid(q)\n z = Mul(m, g)", "the Mul node .* treats every"),
        (PLAIN, "m = Reshape(t, merge)\n z = Mul(m, vector)", "the input of block.0.o is no sum over values"),
        (PLAIN, "m = Reshape(t, merge)\n z = Tanh(m)", "the input of block.0.o is no sum over values"),
        (PLAIN, "m = Reshape(t, merge)\n z = Add(m, v)", "a sum of two activations"),
    ],
    ids=["relu", "gate", "vector", "tanh", "skip"],
)
def test_what_treats_channels_one_by_one_is_refused(values: str, sums: str, reason: str, tmp_path: Path) -> None:
    model = _attention(tmp_path, values, sums, vector=VECTOR)
    _assert_refused(model, reason)


def test_values_with_other_readers_are_refused(tmp_path: Path) -> None:
    model = _attention(tmp_path, PLAIN, MERGE)
    model.graph.outputs.append(next(layer for layer in find_linears(model).layers if layer.role == "v").output)
    _assert_refused(model, "is also an output of the graph")


def test_one_attention_that_does_not_allow_it_leaves_all_alone() -> None:
    model = load_model(families.model("llama", families.GENAI_FP32).path)
    layers = find_linears(model).by_label()
    layers["block.2.o"].node.replace_input_with(1, layers["block.1.o"].node.inputs[1])
    _assert_refused(model, "the weight .* of block.1.o is read by other nodes too")


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    weights = {"w": np.eye(8, dtype=np.float32)}
    _assert_refused(model_from_text(tmp_path, SIGNATURE, "y = MatMul(x, w)", weights), "no attention was found")


def _assert_refused(model: ir.Model, reason: str) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    rotate = RotateHeadsPass()
    assert not rotate(model).modified
    assert rotate.applied is None
    assert rotate.refused is not None
    assert re.search(reason, rotate.refused), rotate.refused
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
