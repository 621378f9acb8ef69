"""Folding a scale where find_scale_site says must leave the model's outputs as they are."""

from __future__ import annotations

import re
from pathlib import Path

import families
import numpy as np
import pytest
from graph_tools import fold, model_from_text, run

from fptq_onnx.graph.activation_groups import ActivationGroup, group_by_activation
from fptq_onnx.graph.linears import LinearSearch, find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.producers import ScaleSite, find_scale_site, find_shift_site

# What each group's scale folds into, by the roles of its layers; anything else needs a Mul.
DECODER = {"q,k,v": "norm", "qkv": "norm", "o": "linear", "gate,up": "norm", "down": "linear", "lm_head": "norm"}
KINDS = {
    "llama": DECODER,
    "llama-untied": DECODER,
    "qwen2": DECODER,
    "gpt2": {"qkv": "norm", "o": "linear", "fc1": "norm", "fc2": "none", "lm_head": "norm"},
    # post-norm: the normed value is the residual stream, so only o and the pooler or head fold
    "bert": {"q,k,v": "none", "o": "linear", "fc1": "none", "fc2": "none", "other": "norm", "lm_head": "norm"},
    "bert-classifier": {"q,k,v": "none", "o": "linear", "fc1": "none", "fc2": "none"},
}


def _sites(model, linears: LinearSearch) -> list[tuple[ActivationGroup, ScaleSite]]:
    groups = group_by_activation(linears.layers)
    return [(group, find_scale_site(model, group, linears)) for group in groups]


def _scale(site: ScaleSite, seed: int) -> np.ndarray:
    free = np.random.default_rng(seed).uniform(0.4, 2.5, site.tie_groups.max() + 1).astype(np.float32)
    return free[site.tie_groups]


def test_kinds_in_every_family(tiny_model: families.TinyModel) -> None:
    model = load_model(tiny_model.path)
    expected = KINDS[tiny_model.architecture]
    for group, site in _sites(model, find_linears(model)):
        roles = ",".join(layer.role for layer in group.layers)
        if roles in expected:
            assert site.kind == expected[roles], f"{roles}: {site.reason}"
        assert site.reason
        assert (site.kind == "none") == (site.targets == ())


def test_folding_every_site_keeps_the_outputs(tiny_model: families.TinyModel, tmp_path: Path) -> None:
    model = load_model(tiny_model.path)
    linears = find_linears(model)
    sites = [(group, site) for group, site in _sites(model, linears) if site.kind != "none"]
    activations = [group.activation for group, _ in sites]
    feeds = tiny_model.feeds(tiny_model.token_ids())
    before = run(model, feeds, tmp_path, activations)
    scales = [_scale(site, seed) for seed, (_, site) in enumerate(sites)]
    for (group, _), scale in zip(sites, scales, strict=True):
        fold(model, group, scale)
    after = run(model, feeds, tmp_path, activations)
    tolerance = 2e-2 if tiny_model.dtype == "float16" else 1e-4
    logits = before["logits"].astype(np.float32)
    assert np.abs(after["logits"] - logits).max() <= tolerance * np.abs(logits).max()
    for activation, scale in zip(activations, scales, strict=True):
        wanted = before[activation.name].astype(np.float32) / scale
        np.testing.assert_allclose(after[activation.name], wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_grouped_heads_are_tied_by_value_head() -> None:
    model = load_model(families.model("llama", families.GENAI_FP32).path)
    linears = find_linears(model)
    group = next(g for g in group_by_activation(linears.layers) if g.layers[0].label == "block.0.o")
    site = find_scale_site(model, group, linears)
    heads, size, repeat = families.HEADS, families.HEAD_SIZE, families.HEADS // families.KV_HEADS
    head, channel = np.divmod(np.arange(heads * size), size)
    np.testing.assert_array_equal(site.tie_groups, head // repeat * size + channel)
    # packed: columns of query and key stay as they are
    (target,) = site.targets
    first_value = (families.HEADS + families.KV_HEADS) * size
    assert target.axis == 1
    assert (target.channels[:first_value] == -1).all()
    assert (target.channels[first_value:] >= 0).all()
    np.testing.assert_array_equal(site.tie_groups[target.channels[first_value:]], np.arange(families.KV_HEADS * size))


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32])
def test_cache_of_the_folded_model_decodes_to_the_same_logits(family: str, tmp_path: Path) -> None:
    tiny = families.model("llama", family)
    tokens = tiny.token_ids(batch=1, length=9)

    def decode(model) -> np.ndarray:
        feeds = tiny.feeds(tokens[:, :6])
        first = run(model, feeds, tmp_path)
        following = tiny.feeds(tokens) | {"input_ids": tokens[:, 6:]}
        if "position_ids" in following:
            following["position_ids"] = following["position_ids"][:, 6:]
        for name in list(following):
            if name.startswith("past_key_values"):
                following[name] = first[name.replace("past_key_values", "present")]
        return run(model, following, tmp_path)["logits"]

    model = load_model(tiny.path)
    linears = find_linears(model)
    before = decode(model)
    cached = [(g, s) for g, s in _sites(model, linears) if s.scales_cache]
    assert [g.layers[0].role for g, _ in cached] == ["o"] * tiny.blocks
    for seed, (group, site) in enumerate(cached):
        fold(model, group, _scale(site, seed))
    np.testing.assert_allclose(decode(model), before, rtol=0, atol=1e-4 * np.abs(before).max())


# ---- hand-built traps ----------------------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
WEIGHTS = {
    "gamma": RNG.uniform(0.5, 1.5, 8).astype(np.float32),
    "beta": RNG.normal(size=8).astype(np.float32),
    "w1": RNG.normal(size=(8, 6)).astype(np.float32),
    "w2": RNG.normal(size=(8, 6)).astype(np.float32),
    "bias": RNG.normal(size=6).astype(np.float32),
    "down": RNG.normal(size=(6, 8)).astype(np.float32),
}
PACKED = RNG.normal(size=(8, 12)).astype(np.float32)
X = {"x": RNG.normal(size=(2, 3, 8)).astype(np.float32)}
SIGNATURE = "(float[2, 3, 8] x) => (float[2, 3, n] y)"


def _indices(*values: int) -> dict[str, np.ndarray]:
    """Initializers i0, i6, ... and last (-1) for Slice."""
    return {"last" if value < 0 else f"i{value}": np.array([value]) for value in values}


def _only_site(tmp_path: Path, body: str, signature: str = SIGNATURE, position: int = 0, **extra: np.ndarray):
    used = {name: array for name, array in (WEIGHTS | extra).items() if re.search(rf"[(,] *{name} *[,)]", body)}
    opset = 23 if "= Attention" in body else 21
    header = f'ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]'
    model = model_from_text(tmp_path, signature, body, used, header)
    linears = find_linears(model)
    group = group_by_activation(linears.layers)[position]
    return model, group, find_scale_site(model, group, linears)


def _check_fold(model, group: ActivationGroup, site: ScaleSite, tmp_path: Path) -> None:
    before = run(model, X, tmp_path, [group.activation])
    scale = _scale(site, 3)
    fold(model, group, scale)
    after = run(model, X, tmp_path, [group.activation])
    for name in {output.name for output in model.graph.outputs}:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-4 * np.abs(before[name]).max())
    np.testing.assert_allclose(
        after[group.activation.name], before[group.activation.name] / scale, rtol=1e-5, atol=1e-6
    )


def test_norm_weight_shared_by_two_norms_gets_a_private_copy(tmp_path: Path) -> None:
    body = """
        a = LayerNormalization(x, gamma, beta)
        p = MatMul(a, w1)
        t = MatMul(p, down)
        h = Add(x, t)
        b = LayerNormalization(h, gamma, beta)
        y = MatMul(b, w2)"""
    model, group, site = _only_site(tmp_path, body)
    assert site.kind == "norm"
    assert [target.initializer.name for target in site.targets] == ["gamma", "beta"]
    assert all(target.shared for target in site.targets)
    _check_fold(model, group, site, tmp_path)


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        ("z = Relu(n)", "also read by the Relu node"),
        ("z = Identity(n)", "also an output|also read by the Identity"),
        ("z = Slice(n, i0, i2, last)", "also read by the Slice node"),
    ],
)
def test_normed_value_read_by_others_is_left_alone(tmp_path: Path, reader: str, reason: str) -> None:
    body = f"n = LayerNormalization(x, gamma, beta)\n y = MatMul(n, w1)\n {reader}"
    signature = "(float[2, 3, 8] x) => (float[2, 3, n] y, float[2, 3, m] z)"
    _, group, site = _only_site(tmp_path, body, signature, **_indices(0, 2, -1))
    assert site.kind == "none"
    assert site.targets == ()
    assert re.search(reason, site.reason), site.reason
    np.testing.assert_array_equal(site.tie_groups, np.arange(group.k))


def test_normed_value_that_is_a_graph_output_is_left_alone(tmp_path: Path) -> None:
    body = "n = LayerNormalization(x, gamma, beta)\n y = MatMul(n, w1)"
    _, _, site = _only_site(tmp_path, body, "(float[2, 3, 8] x) => (float[2, 3, m] y, float[2, 3, 8] n)")
    assert site.kind == "none"
    assert "n is also an output of the graph" in site.reason


def test_shape_readers_do_not_matter(tmp_path: Path) -> None:
    body = "n = LayerNormalization(x, gamma, beta)\n y = MatMul(n, w1)\n s = Shape(n)"
    model, group, site = _only_site(tmp_path, body, "(float[2, 3, 8] x) => (float[2, 3, m] y, int64[3] s)")
    assert site.kind == "norm"
    _check_fold(model, group, site, tmp_path)


def test_residual_output_of_a_fused_skip_norm_is_never_scaled(tmp_path: Path) -> None:
    body = """
        n, e1, e2, h = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-6> (x, x, gamma)
        y = MatMul(n, w1)
        z = MatMul(h, w2)"""
    signature = "(float[2, 3, 8] x) => (float[2, 3, m] y, float[2, 3, k] z)"
    model, group, site = _only_site(tmp_path, body, signature)
    assert site.kind == "norm"
    _check_fold(model, group, site, tmp_path)
    _, _, second = _only_site(tmp_path, body, signature, position=1)
    assert second.kind == "none"
    assert "residual stream" in second.reason


@pytest.mark.parametrize("order", ["Mul(act, u)", "Mul(u, act)"])
def test_gated_product_folds_into_up_with_its_bias(tmp_path: Path, order: str) -> None:
    body = f"""
        g = MatMul(x, w1)
        s = Sigmoid(g)
        act = Mul(g, s)
        u0 = MatMul(x, w2)
        u = Add(bias, u0)
        p = {order}
        y = MatMul(p, down)"""
    model, group, site = _only_site(tmp_path, body, position=1)
    assert site.kind == "linear"
    assert [target.initializer.name for target in site.targets] == ["w2", "bias"]
    _check_fold(model, group, site, tmp_path)


def test_packed_gate_up_scales_the_up_columns_only(tmp_path: Path) -> None:
    body = """
        f0 = MatMul(x, packed)
        f = Add(f0, packed_bias)
        g, u = Split <axis = -1, num_outputs = 2> (f)
        act = Gelu(g)
        p = Mul(act, u)
        y = MatMul(p, down)"""
    packed = {
        "packed": RNG.normal(size=(8, 12)).astype(np.float32),
        "packed_bias": RNG.normal(size=12).astype(np.float32),
    }
    model, group, site = _only_site(tmp_path, body, position=1, **packed)
    assert site.kind == "linear"
    np.testing.assert_array_equal(site.targets[0].channels, [-1] * 6 + list(range(6)))
    _check_fold(model, group, site, tmp_path)


def test_packed_halves_the_wrong_way_round_and_sliced(tmp_path: Path) -> None:
    """Slices instead of Split, up first: the reader of the other half must not count as a reader."""
    body = """
        f = MatMul(x, packed)
        u = Slice(f, i0, i6, last)
        g = Slice(f, i6, i12, last)
        act = Gelu(g)
        p = Mul(act, u)
        y = MatMul(p, down)"""
    model, group, site = _only_site(tmp_path, body, position=1, packed=PACKED, **_indices(0, 5, 6, 11, 12, -1))
    assert site.kind == "linear"
    np.testing.assert_array_equal(site.targets[0].channels, [*range(6)] + [-1] * 6)
    _check_fold(model, group, site, tmp_path)


def test_overlapping_reader_of_a_packed_layer_is_seen(tmp_path: Path) -> None:
    body = """
        f = MatMul(x, packed)
        u = Slice(f, i0, i6, last)
        g = Slice(f, i5, i11, last)
        act = Gelu(g)
        p = Mul(act, u)
        y = MatMul(p, down)"""
    _, _, site = _only_site(tmp_path, body, position=1, packed=PACKED, **_indices(0, 5, 6, 11, 12, -1))
    assert site.kind == "none"


def test_relu_lets_a_positive_scale_through(tmp_path: Path) -> None:
    body = "h0 = MatMul(x, w1)\n h1 = Add(h0, bias)\n h = Relu(h1)\n y = MatMul(h, down)"
    model, group, site = _only_site(tmp_path, body, position=1)
    assert site.kind == "linear"
    _check_fold(model, group, site, tmp_path)


def test_gelu_does_not(tmp_path: Path) -> None:
    body = "h0 = MatMul(x, w1)\n h = Gelu(h0)\n y = MatMul(h, down)"
    _, _, site = _only_site(tmp_path, body, position=1)
    assert site.kind == "none"
    assert "non-linear" in site.reason


def test_weight_shared_by_two_layers_is_not_divided(tmp_path: Path) -> None:
    body = """
        g = MatMul(x, w1)
        act = Gelu(g)
        u = MatMul(x, w1)
        p = Mul(act, u)
        y = MatMul(p, down)"""
    _, _, site = _only_site(tmp_path, body, position=1)
    assert site.kind == "none"
    assert "w1" in site.reason


def test_transposed_producer_weight_is_divided_along_the_right_axis(tmp_path: Path) -> None:
    body = """
        wt = Transpose <perm = [1, 0]> (stored)
        u = MatMul(x, wt)
        h = Relu(u)
        y = MatMul(h, down)"""
    model, group, site = _only_site(tmp_path, body, position=1, stored=WEIGHTS["w1"].T.copy())
    assert (site.kind, site.targets[0].axis) == ("linear", 0)
    _check_fold(model, group, site, tmp_path)


def test_gemm_producer_with_transposed_weight_and_bias(tmp_path: Path) -> None:
    body = """
        flat = Reshape(x, rows)
        u = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (flat, stored, bias)
        h = Relu(u)
        y2 = Gemm(h, down)
        y = Reshape(y2, back)"""
    extra = {"stored": WEIGHTS["w1"].T.copy(), "rows": np.array([-1, 8]), "back": np.array([2, 3, 8])}
    model, group, site = _only_site(tmp_path, body, position=1, **extra)
    assert [(t.initializer.name, t.axis) for t in site.targets] == [("stored", 0), ("bias", 0)]
    _check_fold(model, group, site, tmp_path)


def test_exploded_layer_norm_divides_weight_and_bias(tmp_path: Path) -> None:
    body = """
        m = ReduceMean <keepdims = 1> (x, last)
        c = Sub(x, m)
        q = Mul(c, c)
        v = ReduceMean <keepdims = 1> (q, last)
        e = Add(v, eps)
        r = Sqrt(e)
        d = Div(c, r)
        g = Mul(gamma, d)
        n = Add(g, beta)
        y = MatMul(n, w1)"""
    extra = {"last": np.array([-1]), "eps": np.array(1e-5, np.float32)}
    model, group, site = _only_site(tmp_path, body, **extra)
    assert site.kind == "norm"
    assert site.reason.startswith("norm weight gamma")
    assert {target.initializer.name for target in site.targets} == {"gamma", "beta"}
    _check_fold(model, group, site, tmp_path)


# Query heads, value heads and their size, in each operator's own convention.
FUSED_ATTENTION = {
    "GroupQueryAttention": (
        'a = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, "", "", ends, total)',
        (4, 2, 8),
    ),
    "packed GroupQueryAttention": (
        "f = MatMul(x, wqkv)\n"
        'a = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (f, "", "", "", "", ends, total)',
        (4, 2, 8),
    ),
    "MultiHeadAttention": ("a = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v)", (4, 4, 4)),
    "Attention, 3-D": ("a = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)", (4, 2, 4)),
    "Attention, 4-D": (
        """q4r = Reshape(q, by_head)
        k4r = Reshape(k, by_group)
        v4r = Reshape(v, by_group)
        q4 = Transpose <perm = [0, 2, 1, 3]> (q4r)
        k4 = Transpose <perm = [0, 2, 1, 3]> (k4r)
        v4 = Transpose <perm = [0, 2, 1, 3]> (v4r)
        a4 = Attention (q4, k4, v4)
        a4t = Transpose <perm = [0, 2, 1, 3]> (a4)
        a = Reshape(a4t, flat)""",
        (4, 2, 4),
    ),
}


@pytest.mark.parametrize(("call", "heads"), FUSED_ATTENTION.values(), ids=FUSED_ATTENTION.keys())
def test_fused_attention_operators(tmp_path: Path, call: str, heads: tuple[int, int, int]) -> None:
    count, groups, size = heads
    projections = "" if "wqkv" in call else "q = MatMul(x, wq)\n k = MatMul(x, wk)\n v = MatMul(x, wv)\n"
    body = f"{projections} {call}\n y = MatMul(a, wo)"
    extra = {
        "wq": RNG.normal(size=(8, count * size)).astype(np.float32),
        "wk": RNG.normal(size=(8, groups * size)).astype(np.float32),
        "wv": RNG.normal(size=(8, groups * size)).astype(np.float32),
        "wqkv": RNG.normal(size=(8, (count + 2 * groups) * size)).astype(np.float32),
        "wo": RNG.normal(size=(count * size, 8)).astype(np.float32),
        "ends": np.full(2, 2, np.int32),
        "total": np.array(3, np.int32),
        "by_head": np.array([0, 0, count, size]),
        "by_group": np.array([0, 0, groups, size]),
        "flat": np.array([0, 0, -1]),
    }
    model, group, site = _only_site(tmp_path, body, position=1, **extra)
    assert site.kind == "linear", site.reason
    assert len(np.unique(site.tie_groups)) == groups * size
    _check_fold(model, group, site, tmp_path)


def test_cache_that_only_goes_out_is_left_alone(tmp_path: Path) -> None:
    """A model for the prompt alone: its cache goes to another model, which would not know about the scale."""
    body = """
        f = MatMul(x, wqkv)
        a, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (f, "", "", "", "", ends, total)
        y = MatMul(a, wo)"""
    extra = {
        "wqkv": RNG.normal(size=(8, 64)).astype(np.float32),
        "wo": RNG.normal(size=(32, 8)).astype(np.float32),
        "ends": np.full(2, 2, np.int32),
        "total": np.array(3, np.int32),
    }
    signature = "(float[2, 3, 8] x) => (float[2, 3, n] y, float[2, 2, 3, 8] pk, float[2, 2, 3, 8] pv)"
    _, _, site = _only_site(tmp_path, body, signature, position=1, **extra)
    assert site.kind == "none"
    assert "pv is also an output of the graph" in site.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, w1)", "the graph input x"),
        ("h = Add(x, x)\n y = MatMul(h, w1)", "a sum of two activations"),
        ("h = Tanh(x)\n y = MatMul(h, w1)", "computed by the Tanh node"),
        ("h = Concat <axis = -1> (x, x)\n y = MatMul(h, wide)", "put together from several"),
        ("h = Mul(x, x)\n y = MatMul(h, w1)", "neither factor"),
    ],
)
def test_reasons_when_nothing_can_absorb_the_scale(tmp_path: Path, body: str, reason: str) -> None:
    _, _, site = _only_site(tmp_path, body, wide=RNG.normal(size=(16, 6)).astype(np.float32))
    assert site.kind == "none"
    assert reason in site.reason


# Where the shift of each group's activation goes; every other group has no place for one.
SHIFTS = {
    "gpt2": {"qkv": "ln_1.bias", "o": "c_attn.bias", "fc1": "ln_2.bias"},
    # post-norm: the normed value is the residual stream
    "bert": {"o": "value.bias", "lm_head": "LayerNorm.bias"},
    "bert-classifier": {"o": "value.bias"},
}
SHIFT_MODELS = (
    ("gpt2", families.DYNAMO),
    ("gpt2", families.DYNAMO_KV),
    ("bert", families.DYNAMO),
    ("llama", families.GENAI_FP32),
    ("qwen2", families.DYNAMO_KV),
)


@pytest.mark.parametrize(("architecture", "family"), SHIFT_MODELS)
def test_shifts_in_every_family(architecture: str, family: str) -> None:
    linears = find_linears(load_model(families.model(architecture, family).path))
    expected = SHIFTS.get(architecture, {})
    for group in group_by_activation(linears.layers):
        site = find_shift_site(group, linears)
        roles = ",".join(layer.role for layer in group.layers)
        assert site.reason
        if roles == "lm_head":
            assert (site.target is None) == any(layer.bias is None for layer in group.layers), site.reason
        elif roles in expected:
            assert site.target is not None and expected[roles] in site.reason, f"{roles}: {site.reason}"
        elif roles != "other":
            assert site.target is None, f"{roles}: {site.reason}"


SHIFTED_WEIGHTS = {"gamma": WEIGHTS["gamma"], "beta": WEIGHTS["beta"], "c": RNG.normal(size=8).astype(np.float32)}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = LayerNormalization(x, gamma, beta)\n y = MatMul(a, w1)", "has no bias to make up for a shift"),
        ("a = LayerNormalization(x, gamma)\n m = MatMul(a, w1)\n y = Add(m, c)", "adds no bias"),
        ("p = MatMul(x, w1)\n a = Relu(p)\n m = MatMul(a, w1)\n y = Add(m, c)", "Relu node .* does not let a shift"),
        ("p = MatMul(x, w1)\n a = Identity(p)\n m = MatMul(a, w1)\n y = Add(m, c)", "has no bias that a shift"),
        ("p = MatMul(x, w1)\n h = Add(p, c)\n a = Mul(h, half)\n m = MatMul(a, w1)\n y = Add(m, c)", "Mul node"),
        ("p = LayerNormalization(x, gamma, beta)\n m = MatMul(p, w1)\n t = Add(m, c)\n y = Add(t, p)", "also read by"),
    ],
)
def test_reasons_when_nothing_can_absorb_the_shift(tmp_path: Path, body: str, reason: str) -> None:
    extra = SHIFTED_WEIGHTS | {"half": np.array(0.5, np.float32), "w1": RNG.normal(size=(8, 8)).astype(np.float32)}
    model, _, _ = _only_site(tmp_path, body, SIGNATURE.replace("n]", "8]"), **extra)
    linears = find_linears(model)
    site = find_shift_site(group_by_activation(linears.layers)[-1], linears)
    assert site.target is None
    assert re.search(reason, site.reason), site.reason


@pytest.mark.parametrize(
    ("attention", "sums_to_one"),
    [
        ('GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, "", "", ends, total)', True),
        (
            'GroupQueryAttention <num_heads = 4, kv_num_heads = 2, smooth_softmax = 1> (q, k, v, "", "", ends, total)',
            False,
        ),
        (
            "GroupQueryAttention <num_heads = 4, kv_num_heads = 2> "
            '(q, k, v, "", "", ends, total, "", "", "", "", sink)',
            False,
        ),
    ],
)
def test_attention_lets_a_shift_through_where_its_weights_sum_to_one(
    tmp_path: Path, attention: str, sums_to_one: bool
) -> None:
    body = f"""q = MatMul(x, wq)
        k = MatMul(x, wk)
        v0 = MatMul(x, wv)
        v = Add(v0, bv)
        a = com.microsoft.{attention}
        m = MatMul(a, wo)
        y = Add(m, c)"""
    extra = {
        "wq": RNG.normal(size=(8, 32)).astype(np.float32),
        "wk": RNG.normal(size=(8, 16)).astype(np.float32),
        "wv": RNG.normal(size=(8, 16)).astype(np.float32),
        "bv": RNG.normal(size=16).astype(np.float32),
        "wo": RNG.normal(size=(32, 8)).astype(np.float32),
        "c": SHIFTED_WEIGHTS["c"],
        "ends": np.full(2, 2, np.int32),
        "total": np.array(3, np.int32),
        "sink": np.ones(4, np.float32),
    }
    model, group, _ = _only_site(tmp_path, body, SIGNATURE.replace("n]", "8]"), position=1, **extra)
    site = find_shift_site(group, find_linears(model))
    assert (site.target is not None) == sums_to_one, site.reason
    if sums_to_one:
        assert len(np.unique(site.tie_groups)) == 16
    else:
        assert "do not sum to one" in site.reason
