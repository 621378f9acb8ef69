"""Cut models: run one after another, the segments are the model."""

from __future__ import annotations

import families
import numpy as np
import pytest

from fptq_onnx.analysis.segments import cut
from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.opset import ensure_opset

EXACT = [("llama", family) for family in (families.DYNAMO, families.DYNAMO_KV, families.GENAI_FP32)]
# Without a cut onnxruntime fuses across it, which changes the order of float sums.
NEARLY = [("gpt2", families.DYNAMO_KV), ("bert-classifier", families.DYNAMO), ("llama", families.GENAI_FP16)]


def _run_cut(tiny: families.TinyModel, ids: np.ndarray) -> np.ndarray:
    model = load_model(tiny.path)
    ensure_opset(model)
    values = describe_inputs(model).feeds(ids)
    for segment in cut(model, find_linears(model)):
        session = memory_session(segment.model, threads=1)
        fed = {name: values[name] for name in segment.inputs}
        values |= dict(zip(segment.outputs, session.run(list(segment.outputs), fed), strict=True))
    return values["logits"].astype(np.float32)


@pytest.mark.parametrize(("architecture", "family"), EXACT)
def test_segments_compute_the_model_bit_for_bit(architecture: str, family: str) -> None:
    tiny = families.model(architecture, family)
    ids = tiny.token_ids()
    np.testing.assert_array_equal(_run_cut(tiny, ids), tiny.run(ids))


@pytest.mark.parametrize(("architecture", "family"), NEARLY)
def test_segments_compute_the_model(architecture: str, family: str) -> None:
    tiny = families.model(architecture, family)
    ids = tiny.token_ids()
    wanted = tiny.run(ids)
    tolerance = (5e-3 if tiny.dtype == "float16" else 1e-5) * np.abs(wanted).max()
    np.testing.assert_allclose(_run_cut(tiny, ids), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("architecture", "family"), [*EXACT, *NEARLY])
def test_every_layer_is_in_one_segment(architecture: str, family: str) -> None:
    model = load_model(families.model(architecture, family).path)
    ensure_opset(model)
    linears = find_linears(model)
    segments = cut(model, linears)
    assert len(segments) == 1 + families.BLOCKS + 1
    assert [name for segment in segments for name in segment.layers] == [layer.name for layer in linears.layers]
    for segment, index in zip(segments[1:-1], range(families.BLOCKS), strict=True):
        blocks = {layer.block for layer in linears.layers if layer.name in segment.layers}
        assert blocks == {index}
    assert not any(name.startswith("present") for segment in segments for name in segment.outputs)
