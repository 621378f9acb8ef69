"""Equalization changes no output of the float model, wherever the scales end up."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
from conversions import constants, relative_error, values
from pass_models import parse, tokens, weight

from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.producers import find_scale_site, find_shift_site
from fptq_onnx.passes.apply_equalization import ApplyEqualizationPass


def _scale(k: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.3, 3.0, k).astype(np.float32)


def _apply(model, scales):
    equalization = ApplyEqualizationPass(scales)
    assert equalization(model).modified == bool(scales)
    return equalization.applied


def test_every_activation_of_every_model(tiny_model: families.TinyModel) -> None:
    model = load_model(tiny_model.path)
    groups = group_by_activation(find_linears(model).layers)
    scales = {g.activation.name: _scale(g.k, seed) for seed, g in enumerate(groups)}
    feeds = tiny_model.feeds(tiny_model.token_ids())
    before = values(model, ["logits", *scales], feeds, library=False)
    applied = _apply(model, scales)
    after = values(model, ["logits", *(a.activation for a in applied.values())], feeds, library=False)

    tolerance = 2e-2 if tiny_model.dtype == "float16" else 1e-4
    assert relative_error(after["logits"], before["logits"]) < tolerance
    assert applied.keys() == scales.keys()
    for name, result in applied.items():
        assert relative_error(after[result.activation], before[name].astype(np.float32) / result.scale) < tolerance
        assert result.reason
        assert (result.kind == "mul") == (result.activation != name)


def test_float_weights_do_not_pile_up() -> None:
    """The scaled weights replace the others: the model keeps its size."""
    model = load_model(families.model("llama-untied", families.DYNAMO).path)
    size = sum(array.nbytes for array in constants(model).values())
    groups = group_by_activation(find_linears(model).layers)
    _apply(model, {g.activation.name: _scale(g.k) for g in groups})
    assert sum(array.nbytes for array in constants(model).values()) == size


def test_query_heads_share_the_largest_scale_of_their_value_head() -> None:
    model = load_model(families.model("llama", families.DYNAMO).path)
    linears = find_linears(model)
    group = next(g for g in group_by_activation(linears.layers) if g.layers[0].label == "block.1.o")
    ties = find_scale_site(model, group, linears).tie_groups
    wanted = _scale(group.k)
    applied = _apply(model, {group.activation.name: wanted})[group.activation.name]
    assert applied.kind == "linear"
    assert applied.scale.tolist() == [wanted[ties == tie].max() for tie in ties]


def test_mul_in_front_of_the_layers_only(tmp_path: Path) -> None:
    """Other readers of the activation keep its values."""
    model = parse(
        tmp_path,
        f"(float[B, S, {24}] X) => (float[B, S, 10] Y, float[B, S, 10] Z, float[B, S, 24] kept)",
        "activation = Sigmoid(X)\nY = MatMul(activation, w1)\nZ = MatMul(activation, w2)\nkept = Neg(activation)",
        {"w1": weight(seed=1), "w2": weight(seed=2)},
    )
    feeds = {"X": tokens()}
    names = ["Y", "Z", "kept"]
    before = values(model, names, feeds)
    (applied,) = _apply(model, {"activation": _scale(24)}).values()
    assert applied.kind == "mul"
    assert [node.op_type for node in model.graph] == ["Sigmoid", "Mul", "MatMul", "MatMul", "Neg"]
    after = values(model, [*names, applied.activation], feeds)
    np.testing.assert_array_equal(after["kept"], before["kept"])
    np.testing.assert_allclose(after[applied.activation], -before["kept"] / applied.scale, rtol=1e-6)
    for name in ("Y", "Z"):
        assert relative_error(after[name], before[name]) < 1e-5


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(tmp_path: Path, transposed: int) -> None:
    """alpha and transB go into the new weight; the bias and its beta stay."""
    w = weight()
    model = parse(
        tmp_path,
        "(float[B, 24] X) => (float[B, 10] Y)",
        f"activation = Tanh(X)\nY = Gemm<alpha = 0.5, beta = 2.0, transB = {transposed}>(activation, w, c)",
        {"w": w.T.copy() if transposed else w, "c": weight(1, 10, 3)[0]},
    )
    feeds = {"X": tokens()[0]}
    before = values(model, ["Y"], feeds)["Y"]
    scale = _scale(24)
    _apply(model, {"activation": scale})
    assert relative_error(values(model, ["Y"], feeds)["Y"], before) < 1e-5
    (layer,) = find_linears(model).layers
    np.testing.assert_allclose(layer.weight_array(), 0.5 * scale[:, None] * w, rtol=1e-6)
    np.testing.assert_allclose(layer.bias_array(), 2 * weight(1, 10, 3)[0], rtol=1e-6)


def test_norm_weight_shared_with_another_norm(tmp_path: Path) -> None:
    """Exporters merge equal tensors: the other norm must keep the old weight and bias."""
    body = (
        "first = LayerNormalization<axis = -1>(X, gamma, beta)\n"
        "Y = MatMul(first, w1)\n"
        "second = LayerNormalization<axis = -1>(X, gamma, beta)\n"
        "other = Neg(second)\n"
        "Z = MatMul(other, w2)"
    )
    weights = {"gamma": 1 + weight(1, 24, 4)[0], "beta": weight(1, 24, 5)[0], "w1": weight(), "w2": weight(seed=2)}
    model = parse(tmp_path, "(float[B, S, 24] X) => (float[B, S, 10] Y, float[B, S, 10] Z)", body, weights)
    feeds = {"X": tokens()}
    before = values(model, ["Y", "Z", "first", "second"], feeds)
    (applied,) = _apply(model, {"first": _scale(24)}).values()
    assert applied.kind == "norm"
    after = values(model, ["Y", "Z", "first", "second"], feeds)
    np.testing.assert_array_equal(after["second"], before["second"])
    np.testing.assert_array_equal(after["Z"], before["Z"])
    assert relative_error(after["Y"], before["Y"]) < 1e-5
    np.testing.assert_allclose(after["first"], before["first"] / applied.scale, rtol=1e-4, atol=1e-6)


def test_weight_shared_with_another_layer(tmp_path: Path) -> None:
    """A tied weight is copied for the layer that is scaled."""
    model = parse(
        tmp_path,
        "(float[B, S, 24] X) => (float[B, S, 24] Y, float[B, S, 24] Z)",
        "a = Sigmoid(X)\nY = MatMul(a, w)\nb = Tanh(X)\nZ = MatMul(b, w)",
        {"w": weight(24, 24)},
    )
    feeds = {"X": tokens()}
    before = values(model, ["Y", "Z"], feeds)
    _apply(model, {"a": _scale(24)})
    after = values(model, ["Y", "Z"], feeds)
    np.testing.assert_array_equal(after["Z"], before["Z"])
    assert relative_error(after["Y"], before["Y"]) < 1e-5
    np.testing.assert_array_equal(constants(model)["w"], weight(24, 24))


def test_no_scale_changes_nothing() -> None:
    model = load_model(families.model("llama", families.DYNAMO).path)
    nodes = list(model.graph)
    assert _apply(model, {}) == {}
    assert list(model.graph) == nodes


SHIFTED_MODELS = (
    ("gpt2", families.DYNAMO),
    ("gpt2", families.DYNAMO_KV),
    ("bert", families.DYNAMO),
)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("architecture", "family"), SHIFTED_MODELS)
def test_every_shift_of_every_model(architecture: str, family: str, scaled: bool) -> None:
    """Far shifts, at every place that takes one, with and without a scale, change no output and add no node."""
    tiny = families.model(architecture, family)
    model = load_model(tiny.path)
    linears = find_linears(model)
    sites = {g.activation.name: find_shift_site(g, linears) for g in group_by_activation(linears.layers)}
    sites = {name: site for name, site in sites.items() if site.target is not None}
    assert len(sites) >= 3
    shifts = {
        name: (3 * np.random.default_rng(seed).standard_normal(site.tie_groups.size)[site.tie_groups]).astype(
            np.float32
        )
        for seed, (name, site) in enumerate(sites.items())
    }
    scales = {name: _scale(z.size, 7) for name, z in shifts.items()} if scaled else {}
    feeds = tiny.feeds(tiny.token_ids())
    before = values(model, ["logits", *sites], feeds, library=False)
    count = len(list(model.graph))
    equalization = ApplyEqualizationPass(scales, shifts)
    assert equalization(model).modified
    after = values(model, ["logits", *sites], feeds, library=False)
    assert len(list(model.graph)) <= count
    assert relative_error(after["logits"], before["logits"]) < 1e-4
    for name, applied in equalization.applied.items():
        assert relative_error(after[name], applied.smooth(before[name])) < 1e-4
        assert relative_error(applied.undo(after[name]), before[name]) < 1e-4
        assert applied.kind == ("shift" if not scaled else f"{find_scale_kind(applied.reason)}+shift")
        assert sites[name].reason.split(" ")[1] in applied.reason
    # statistics and moments are those of the activation as the layers read it now
    assert {name: applied.activation for name, applied in equalization.applied.items()} == {n: n for n in sites}


def find_scale_kind(reason: str) -> str:
    return "norm" if reason.startswith("norm weight") else "linear"


def test_a_zero_bias_takes_a_shift(tmp_path: Path) -> None:
    """One that a scale alone need not touch; and the readers' biases may be in a Gemm, with a beta."""
    model = parse(
        tmp_path,
        "(float[B, 24] X) => (float[B, 10] Y)",
        "activation = LayerNormalization<axis = -1>(X, gamma, beta)\n"
        "Y = Gemm<alpha = 0.5, beta = 2.0>(activation, w, c)",
        {"gamma": weight(1, 24, 4)[0], "beta": np.zeros(24, np.float32), "w": weight(), "c": weight(1, 10, 3)[0]},
    )
    feeds = {"X": tokens()[0]}
    before = values(model, ["Y", "activation"], feeds)
    z = 5 * weight(1, 24, 9)[0]
    ApplyEqualizationPass({"activation": _scale(24)}, {"activation": z})(model)
    after = values(model, ["Y", "activation"], feeds)
    assert relative_error(after["Y"], before["Y"]) < 1e-5
    assert relative_error(after["activation"], (before["activation"] - z) / _scale(24)) < 1e-5


def test_a_shift_that_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    model = parse(
        tmp_path,
        "(float[B, 24] X) => (float[B, 10] Y)",
        "activation = Tanh(X)\nm = MatMul(activation, w)\nY = Add(m, c)",
        {"w": weight(), "c": weight(1, 10, 3)[0]},
    )
    with pytest.raises(ValueError, match=r"activation cannot be shifted: .*Tanh"):
        ApplyEqualizationPass({}, {"activation": weight(1, 24)[0]})(model)
