"""What convert verifies with: two files on the same feeds, and their layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx_ir as ir
import pytest
from conversions import converted, values

from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.progress import SilentProgress
from fptq_onnx.quantization.metrics import snr_db
from fptq_onnx.report import Verification
from fptq_onnx.verification import compare_layers, compare_models

Batches = list[dict[str, np.ndarray]]


def _compare(reference: Path, other: Path, batches: Batches, max_kl: float | None = None) -> Verification:
    return compare_models(
        reference, other, batches, data="tokens", max_kl=max_kl, provider="cpu", progress=SilentProgress()
    )


def _tokens(length: int = 9, batch: int = 1, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, families.VOCABULARY, (batch, length), dtype=np.int64)


@pytest.mark.parametrize("family", families.LLAMA_FAMILIES)
def test_a_model_equals_itself(family: str) -> None:
    path = families.model("llama", family).path
    check = _compare(path, path, [{"input_ids": _tokens()}, {"input_ids": _tokens(4, batch=2)}], max_kl=1e-9)
    assert check == Verification("tokens", 17, pytest.approx(0, abs=1e-12), 1.0, math.inf, 1e-9, True)


def test_threshold() -> None:
    result = converted("llama", families.DYNAMO)
    batches = [{"input_ids": _tokens()}]
    kl = _compare(result.tiny.path, result.path, batches).kl_mean
    assert kl > 0.05
    for max_kl, passed in ((kl * 1.01, True), (kl * 0.99, False)):
        check = _compare(result.tiny.path, result.path, batches, max_kl)
        assert (check.kl_mean, check.max_kl, check.passed) == (kl, max_kl, passed)


def test_padding_is_not_counted() -> None:
    """Padded on the right, the tokens of a batch give what they give alone."""
    result = converted("llama", families.DYNAMO)
    tokens = _tokens(8)
    padded = {
        "input_ids": np.pad(tokens, ((0, 0), (0, 5)), constant_values=7),
        "attention_mask": np.pad(np.ones_like(tokens), ((0, 0), (0, 5))),
    }
    alone = _compare(result.tiny.path, result.path, [{"input_ids": tokens}])
    together = _compare(result.tiny.path, result.path, [padded])
    assert together.tokens == alone.tokens == 8
    assert together.kl_mean == pytest.approx(alone.kl_mean, rel=1e-3)
    assert together.top1_agreement == alone.top1_agreement


def test_encoders_without_logits(tmp_path: Path) -> None:
    """A hidden state has no distribution: only its noise is measured."""
    result = converted("bert", families.DYNAMO)
    paths = []
    for name, path in (("before", result.tiny.path), ("after", result.path)):
        model = load_model(path)
        head = next(node for node in model.graph if "logits" in {value.name for value in node.outputs})
        model.graph.outputs[0].name, model.graph.outputs[0] = "unused", head.inputs[0]
        head.outputs[0].name = "unused"
        ir.save(model, tmp_path / f"{name}.onnx")
        paths.append(tmp_path / f"{name}.onnx")
    check = _compare(*paths, [{"input_ids": _tokens(), "attention_mask": np.ones((1, 9), np.int64)}])
    assert check.kl_mean is None and check.top1_agreement is None
    assert check.tokens == 9 and 5 < check.output_snr_db < 40


def _broken(tmp_path: Path, fill: float) -> Path:
    """The tiny Llama with every entry of an output projection replaced."""
    model = load_model(families.model("llama-untied", families.DYNAMO).path)
    layer = find_linears(model).by_label()["lm_head"]
    array = np.full_like(layer.weight.const_value.numpy(), fill)
    layer.weight.const_value = ir.tensor(array, name=layer.weight.name)
    ir.save(model, tmp_path / "broken.onnx")
    return tmp_path / "broken.onnx"


def test_output_that_is_not_finite(tmp_path: Path) -> None:
    good = families.model("llama-untied", families.DYNAMO).path
    with pytest.raises(ModelError, match=r"broken\.onnx: output logits is not finite"):
        _compare(good, _broken(tmp_path, np.nan), [{"input_ids": _tokens()}])


def test_data_that_do_not_fit() -> None:
    path = families.model("llama", families.DYNAMO).path
    with pytest.raises(CalibrationError, match="verification batch 2"):
        _compare(path, path, [{"input_ids": _tokens()}, {"images": _tokens()}])


def _layers(reference: ir.Model, other: Path, batches: list[dict[str, Any]]) -> dict[str, float]:
    return compare_layers(reference, other, batches, provider="cpu", progress=SilentProgress())


def test_layer_noise_is_that_of_the_layers_outputs() -> None:
    """gpt2: Gemm and packed projections with biases; no scale was applied, so the float file is the reference."""
    result = converted("gpt2", families.DYNAMO)
    assert {layer.equalization for layer in result.report.layers} == {"none"}
    model = load_model(result.tiny.path)
    outputs = {layer.name: layer.output.name for layer in find_linears(model).layers}
    tokens = _tokens()
    noise = _layers(model, result.path, [{"input_ids": tokens}, {"input_ids": _tokens(seed=4)}])
    feeds = result.tiny.feeds(tokens)
    before, after = (values(path, list(outputs.values()), feeds) for path in (result.tiny.path, result.path))
    assert noise.keys() == outputs.keys()
    for layer, output in outputs.items():
        assert noise[layer] == pytest.approx(snr_db(before[output], after[output]), abs=0.05), layer


def test_layers_of_a_model_equal_themselves() -> None:
    tiny = families.model("llama", families.GENAI_FP32)
    noise = _layers(load_model(tiny.path), tiny.path, [{"input_ids": _tokens()}])
    assert len(noise) == 16 and set(noise.values()) == {math.inf}


def test_verification_of_a_conversion_uses_the_scaled_float_model() -> None:
    """Where value or up channels were divided, their own noise must not count as an error."""
    result = converted("llama", families.DYNAMO)
    (up,) = (layer for layer in result.report.layers if layer.label == "block.2.up")
    (gate,) = (layer for layer in result.report.layers if layer.label == "block.2.gate")
    assert abs(up.snr_db - gate.snr_db) < 4
    assert min(layer.snr_db for layer in result.report.layers) > 3
