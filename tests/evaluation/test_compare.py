"""Layer noise and embedding agreement against direct formulas."""

from __future__ import annotations

import families
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.compare import (
    LayerPair,
    NoiseMeter,
    compare_embeddings,
    cosine_similarity,
    embed,
    expose,
    layer_snr,
    spearman,
)
from fptq_onnx.graph.feeds import describe_inputs


def linear_outputs(model: ir.Model) -> list[str]:
    return [n.outputs[0].name for n in model.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]


def noisy(model: ir.Model, scale: float) -> ir.Model:
    """Copy of a model with noise on the weights of its linear layers."""
    copy, rng = model.clone(), np.random.default_rng(0)
    for node in copy.graph:
        if node.op_type == "MatMul" and node.inputs[1].is_initializer():
            weight = node.inputs[1]
            array = weight.const_value.numpy()
            noise = scale * array.std() * rng.standard_normal(array.shape)
            weight.const_value = ir.tensor((array + noise).astype(array.dtype), name=weight.name)
    return copy


def test_meter_is_the_definition():
    rng = np.random.default_rng(0)
    x, error = rng.standard_normal((2, 100, 7)).astype(np.float32)
    meter = NoiseMeter()
    meter.add(x[:30], x[:30] + error[:30])
    meter.add(x[30:], x[30:] + error[30:])
    added = (x + error).astype(np.float64) - x
    assert meter.snr_db == pytest.approx(10 * np.log10((x.astype(np.float64) ** 2).sum() / (added**2).sum()))
    silent = NoiseMeter()
    assert silent.snr_db == np.inf
    silent.add(np.zeros(3), np.ones(3))
    assert silent.snr_db == -np.inf


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP16])
@pytest.mark.parametrize("pairs_per_run", [7, 64])
def test_layer_snr_is_that_of_the_exposed_values(family, pairs_per_run):
    tiny = families.model("llama", family)
    model = ir.load(tiny.path)
    other = noisy(model, 0.01)
    pairs = [LayerPair(f"layer {i}", name, name) for i, name in enumerate(linear_outputs(model))]
    ids = tiny.token_ids(3, 8)
    batches = ({"input_ids": part} for part in (ids[:2], ids[2:]))
    result = layer_snr(model, other, pairs, batches, pairs_per_run=pairs_per_run)
    assert list(result) == [pair.label for pair in pairs] and pairs
    feeds = describe_inputs(model).feeds(ids)
    for pair in pairs:
        x, y = (memory_session(expose(m, [pair.reference]), threads=1).run([pair.reference], feeds)[0].astype(float)
                for m in (model, other))  # fmt: skip
        assert result[pair.label] == pytest.approx(10 * np.log10((x**2).sum() / ((y - x) ** 2).sum()), abs=0.2)
        assert 10 < result[pair.label] < 60


def test_equal_models_have_no_noise_and_names_may_differ():
    model = ir.load(families.model("llama", families.DYNAMO).path)
    names = linear_outputs(model)
    renamed = model.clone()
    for node in renamed.graph:
        for value in node.outputs:
            if value.name == names[3]:
                value.name = "renamed"
    pairs = [LayerPair("same", names[3], "renamed"), LayerPair("again", names[3], "renamed")]
    assert layer_snr(model, renamed, pairs, [{"input_ids": np.ones((1, 4), np.int64)}]) == {
        "same": np.inf,
        "again": np.inf,
    }


@pytest.mark.parametrize(
    ("pair", "batches", "reason"),
    [
        (("absent", "absent"), 1, "activation absent: is not a value"),
        ((0, 4), 1, "layer x: gives"),
        ((0, 0), 0, "comparison data: hold no batch"),
    ],
)
def test_pairs_that_do_not_fit(pair, batches, reason):
    model = ir.load(families.model("llama", families.DYNAMO).path)
    names = linear_outputs(model)
    first, second = (names[p] if isinstance(p, int) else p for p in pair)
    feeds = [{"input_ids": np.ones((1, 4), np.int64)}] * batches
    with pytest.raises(CalibrationError, match=reason):
        layer_snr(model, model, [LayerPair("x", first, second)], feeds)


vectors = hnp.arrays(np.float64, st.integers(2, 30), elements=st.integers(-5, 5).map(float))


@given(vectors, st.data())
def test_spearman_is_pearson_of_mean_ranks(x, data):
    y = data.draw(hnp.arrays(np.float64, len(x), elements=st.integers(-5, 5).map(float)))
    rank = [[np.mean([i + 1 for i, w in enumerate(sorted(v)) if w == value]) for value in v] for v in (x, y)]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(np.corrcoef(rank)[0, 1], abs=1e-12)
        assert spearman(x, np.exp(x)) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)


def test_cosine_similarity():
    x = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    y = np.array([[6.0, 8.0], [0.0, 2.0], [1.0, 1.0]], np.float32)
    np.testing.assert_allclose(cosine_similarity(x, y), [1, 0, 0])


def test_encoders():
    tiny = families.model("bert", families.DYNAMO)
    model = ir.load(tiny.path)
    inputs = describe_inputs(model)
    ids = tiny.token_ids(8, 10)
    name = next(v.name for v in model.graph.outputs if v.shape is not None and len(v.shape) == 3)
    session, other = (memory_session(m, threads=1) for m in (model, noisy(model, 0.05)))
    batches = [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}]
    x, y = embed(session, inputs, batches, name), embed(other, inputs, batches, name)
    assert x.shape[0] == 8
    agreement = compare_embeddings(x, y)
    assert 0.9 < agreement.cosine_min <= agreement.cosine_mean < 1 and 0.8 < agreement.spearman <= 1
    same = compare_embeddings(x, x)
    assert same.cosine_min == pytest.approx(1) and same.spearman == pytest.approx(1)
    # Padding changes nothing: the mean is over real tokens and attention is masked.
    mask = np.ones((8, 14), np.int64)
    mask[:, 10:] = 0
    padded = {"input_ids": np.pad(ids, ((0, 0), (0, 4))), "attention_mask": mask}
    np.testing.assert_allclose(embed(session, inputs, [padded], name), x, rtol=1e-4, atol=1e-5)


def test_embeddings_that_do_not_fit():
    with pytest.raises(CalibrationError, match=r"have shapes \[2, 3\] and \[3, 3\]"):
        compare_embeddings(np.ones((2, 3)), np.ones((3, 3)))
    assert np.isnan(compare_embeddings(np.ones((2, 3)), np.ones((2, 3))).spearman)
