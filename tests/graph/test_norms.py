"""Norms are found in every form, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
from graph_tools import model_from_text, run

from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.norms import Norm, find_norms

RNG = np.random.default_rng(4)
GAMMA, BETA = RNG.normal(size=(2, 8)).astype(np.float32)
X = {"x": RNG.normal(size=(2, 3, 8)).astype(np.float32)}
CONSTANTS = {
    "gamma": GAMMA,
    "beta": BETA,
    "two": np.array(2.0, np.float32),
    "one": np.array(1.0, np.float32),
    "half": np.array(0.5, np.float32),
    "eps": np.array(1e-5, np.float32),
    "last": np.array([-1]),
}


def _norms(tmp_path: Path, body: str, signature: str = "(float[2, 3, 8] x) => (float[2, 3, 8] y)"):
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    model = model_from_text(tmp_path, signature, body, {n: a for n, a in CONSTANTS.items() if n in words})
    return model, find_norms(model)


def _formula(norm: Norm, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm.weight.const_value.numpy()
    return y if norm.bias is None else y + norm.bias.const_value.numpy()


VARIANCE = "v = ReduceMean <keepdims = 1> (q, last)\n e = Add(v, eps)"
ROOTS = {
    "sqrt, reciprocal": f"q = Pow(c, two)\n {VARIANCE}\n r = Sqrt(e)\n i = Reciprocal(r)\n d = Mul(c, i)",
    "sqrt, 1 / root": f"q = Mul(c, c)\n {VARIANCE}\n r = Sqrt(e)\n i = Div(one, r)\n d = Mul(i, c)",
    "sqrt, division": f"q = Pow(c, two)\n {VARIANCE}\n r = Sqrt(e)\n d = Div(c, r)",
    "power of a half": f"q = Pow(c, two)\n {VARIANCE}\n r = Pow(e, half)\n d = Div(c, r)",
}


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())
@pytest.mark.parametrize("order", ["Mul(gamma, d)", "Mul(d, gamma)"])
def test_exploded_rms_norm(tmp_path: Path, root: str, order: str) -> None:
    model, (norm,) = _norms(tmp_path, root.replace("c,", "x,").replace("c)", "x)") + f"\n y = {order}")
    assert (norm.kind, norm.fused, norm.bias, norm.input.name, norm.output.name) == ("rms", False, None, "x", "y")
    np.testing.assert_allclose(run(model, X, tmp_path)["y"], _formula(norm, X["x"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS.keys())
def test_exploded_layer_norm(tmp_path: Path, root: str) -> None:
    body = f"m = ReduceMean <keepdims = 1> (x, last)\n c = Sub(x, m)\n {root}\n g = Mul(d, gamma)\n y = Add(g, beta)"
    model, (norm,) = _norms(tmp_path, body)
    assert (norm.kind, norm.bias.name, norm.input.name, norm.output.name) == ("layer", "beta", "x", "y")
    np.testing.assert_allclose(run(model, X, tmp_path)["y"], _formula(norm, X["x"]), rtol=1e-5, atol=1e-6)


def test_casts_between_as_in_float16_exports(tmp_path: Path) -> None:
    body = """
        c = Cast <to = 1> (x)
        q = Pow(c, two)
        v = ReduceMean <keepdims = 1> (q, last)
        e = Add(v, eps)
        r = Sqrt(e)
        i = Reciprocal(r)
        d = Mul(c, i)
        h = Cast <to = 10> (d)
        w = Cast <to = 10> (gamma)
        y = Mul(w, h)"""
    _, (norm,) = _norms(tmp_path, body, "(float16[2, 3, 8] x) => (float16[2, 3, 8] y)")
    assert (norm.kind, norm.weight.name, norm.input.name) == ("rms", "gamma", "x")


@pytest.mark.parametrize(
    ("call", "kind", "bias"),
    [
        ("LayerNormalization <epsilon = 1e-5> (x, gamma, beta)", "layer", "beta"),
        ("LayerNormalization <epsilon = 1e-5> (x, gamma)", "layer", None),
        ("SimplifiedLayerNormalization <epsilon = 1e-5> (x, gamma)", "rms", None),
        ("com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (x, x, gamma, beta)", "layer", "beta"),
        ("com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (x, x, gamma)", "rms", None),
    ],
)
def test_fused_norms(tmp_path: Path, call: str, kind: str, bias: str | None) -> None:
    model, (norm,) = _norms(tmp_path, f"y = {call}")
    assert (norm.kind, norm.fused, norm.residual) == (kind, True, None)
    assert (None if norm.bias is None else norm.bias.name) == bias
    x = X["x"] if norm.input is not None else 2 * X["x"]
    np.testing.assert_allclose(run(model, X, tmp_path)["y"], _formula(norm, x), rtol=1e-4, atol=1e-5)


def test_skip_norm_gives_the_residual(tmp_path: Path) -> None:
    body = "n, a, b, s = com.microsoft.SkipSimplifiedLayerNormalization (x, x, gamma)\n y = Add(n, s)"
    _, (norm,) = _norms(tmp_path, body)
    assert (norm.input, norm.residual.name, norm.output.name) == (None, "s", "n")


@pytest.mark.parametrize(
    "body",
    [
        "y = Mul(x, gamma)",  # a layer scale
        f"q = Pow(x, two)\n {VARIANCE}\n d = Mul(x, e)\n y = Mul(d, gamma)",  # no root
        f"q = Identity(x)\n {VARIANCE}\n r = Sqrt(e)\n d = Div(x, r)\n y = Mul(d, gamma)",  # no square
        f"q = Pow(x, one)\n {VARIANCE}\n r = Sqrt(e)\n d = Div(x, r)\n y = Mul(d, gamma)",
        f"t = Tanh(x)\n q = Pow(t, two)\n {VARIANCE}\n r = Sqrt(e)\n d = Div(x, r)\n y = Mul(d, gamma)",  # of another
        f"q = Pow(x, two)\n {VARIANCE}\n r = Sqrt(e)\n d = Mul(x, r)\n y = Mul(d, gamma)",  # times the root
        f"q = Pow(x, two)\n {VARIANCE}\n r = Sqrt(e)\n i = Reciprocal(r)\n d = Div(x, i)\n y = Mul(d, gamma)",
        f"q = Pow(x, two)\n {VARIANCE}\n r = Pow(e, two)\n d = Div(x, r)\n y = Mul(d, gamma)",
        f"q = Pow(x, two)\n {VARIANCE}\n r = Sqrt(e)\n i = Div(half, r)\n d = Mul(x, i)\n y = Mul(d, gamma)",
    ],
)
def test_what_is_no_norm(tmp_path: Path, body: str) -> None:
    assert _norms(tmp_path, body)[1] == []


def test_every_family_has_two_per_block_and_one_at_an_end(tiny_model: families.TinyModel) -> None:
    norms = find_norms(load_model(tiny_model.path))
    assert len(norms) == 2 * tiny_model.blocks + (2 if tiny_model.architecture == "bert" else 1)
    layer = tiny_model.architecture.startswith(("gpt2", "bert"))
    assert {norm.kind for norm in norms} == {"layer" if layer else "rms"}
    assert all((norm.bias is not None) == layer for norm in norms)
    assert all(norm.weight.shape == (families.HIDDEN,) for norm in norms)
    residuals = [norm.residual is not None for norm in norms]
    skip = tiny_model.family.startswith("genai")  # the first norm reads the embedding, the last one ends the stream
    assert residuals == ([False, *[True] * (len(norms) - 2), False] if skip else [False] * len(norms))
