"""Bias correction: the graph edit, and what it does to the mean output of a quantized encoder."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
from conversions import converted, values
from pass_models import N, parse, tokens, weight

from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.passes.weights import shift_bias

BODIES = {
    "add": "P = MatMul(X, w)\nY = Add(b, P)",
    "gemm": "Y = Gemm <beta = 0.5> (X, w, b)",
}


@pytest.mark.parametrize("form", BODIES)
def test_the_shift_arrives_at_the_output(tmp_path: Path, form: str) -> None:
    b = np.arange(N, dtype=np.float32)
    model = parse(tmp_path, "(float[S, 24] X) => (float[S, 10] Y)", BODIES[form], {"w": weight(), "b": b})
    x = tokens()[0]
    before = values(model, ["Y"], {"X": x}, library=False)["Y"]
    (layer,) = find_linears(model).layers
    shift = np.linspace(-1, 1, N).astype(np.float32)
    assert shift_bias(model.graph, layer, shift)
    np.testing.assert_allclose(values(model, ["Y"], {"X": x}, library=False)["Y"], before + shift, rtol=1e-5, atol=1e-5)


def test_a_layer_without_bias_is_left_alone(tmp_path: Path) -> None:
    model = parse(tmp_path, "(float[S, 24] X) => (float[S, 10] Y)", "Y = MatMul(X, w)", {"w": weight()})
    (layer,) = find_linears(model).layers
    assert not shift_bias(model.graph, layer, np.ones(N, np.float32))
    assert len(list(model.graph)) == 1


def test_corrected_biases_keep_the_mean_of_the_first_layers_outputs() -> None:
    """On the calibration data, whose activations the first layers see undisturbed by others."""
    plain, corrected = (
        converted("bert", families.DYNAMO, weights__bias_correction=wanted, activations__scheme="per-token")
        for wanted in (False, True)
    )
    feeds = plain.tiny.feeds(np.random.default_rng(0).integers(0, 300, (2, 24)))
    layers = [layer for layer in find_linears(load_model(plain.tiny.path)).layers if layer.label == "block.0.q"]
    output = str(layers[0].output.name)
    wanted = values(plain.tiny.path, [output], feeds, library=False)[output].mean(axis=(0, 1))
    errors = [
        np.abs(values(c.path, [output], feeds)[output].mean(axis=(0, 1)) - wanted).mean() for c in (plain, corrected)
    ]
    assert errors[1] < 0.8 * errors[0]
