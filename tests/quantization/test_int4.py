import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.errors import ModelError
from fptq_onnx.quantization.int4 import (
    MAX_MULTIPLE,
    dequantize,
    grid_limits,
    group_count,
    group_scales,
    quantize_weight,
    round_to_scales,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)]
GRIDS = ["absmax7", "signed8", "mse_clip", "weighted_clip"]


@st.composite
def weights(draw, magnitudes=(1e-7, 1e-3, 1.0, 100.0)):
    k, n = draw(st.integers(1, 70)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = np.asarray(magnitudes)[rng.integers(0, len(magnitudes), (k, n))]
    w = (rng.standard_normal((k, n)) * scale).astype(np.float32)
    w[:, rng.random(n) < 0.2] = 0
    return w


def group_errors(w, quantized, importance=None):
    e = np.square(w.astype(np.float64) - quantized.dequantize())
    if importance is not None:
        e *= importance[:, None]
    return np.add.reduceat(e, np.arange(0, w.shape[0], quantized.block_size), axis=0)


@given(weights(), st.sampled_from([1, 3, 16, 32, 128]), st.sampled_from(GRIDS), st.sampled_from(DTYPES), st.booleans())
def test_shapes_limits_and_nearest_value(w, group, grid, dtype, structured):
    importance = np.linspace(0.1, 2, w.shape[0])
    multiple = MAX_MULTIPLE if structured else 0
    quantized = quantize_weight(w, group, grid, dtype, importance=importance, max_multiple=multiple)
    low, high = grid_limits(grid)
    assert quantized.q.dtype == np.int8 and quantized.q.shape == w.shape
    assert quantized.scale.dtype == dtype and quantized.scale.shape == (group_count(w.shape[0], group), w.shape[1])
    assert quantized.q.min() >= low and quantized.q.max() <= high
    s = quantized.scale.astype(np.float64)
    assert np.isfinite(s).all() and (s != 0).all()
    rows = np.repeat(s, group, axis=0)[: w.shape[0]]
    # no other code of the grid is nearer (the quotient is a float32, so allow one rounding of it)
    best = np.min(np.abs(np.arange(low, high + 1)[:, None, None] * rows - w), axis=0)
    assert (np.abs(quantized.q * rows - w) <= best + 1e-6 * np.abs(w) + 1e-6 * np.abs(rows)).all()
    np.testing.assert_array_equal(quantized.dequantize(), (quantized.q * rows).astype(np.float32))
    assert (quantized.q[:, ~w.any(axis=0)] == 0).all()


@given(weights(), st.sampled_from([4, 32]), st.sampled_from(DTYPES), st.booleans())
def test_columns_are_independent(w, group, dtype, structured):
    multiple = MAX_MULTIPLE if structured else 0
    whole = group_scales(w, group, "mse_clip", dtype, max_multiple=multiple)
    parts = [group_scales(w[:, i : i + 1], group, "mse_clip", dtype, max_multiple=multiple) for i in range(w.shape[1])]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_column_blocks_give_the_same_answer(monkeypatch):
    w = np.random.default_rng(0).standard_normal((100, 200)).astype(np.float32)
    whole = quantize_weight(w, 32, "signed8", np.float16)
    monkeypatch.setattr("fptq_onnx.quantization.int4._BLOCK_ELEMENTS", 1)
    blocked = quantize_weight(w, 32, "signed8", np.float16)
    np.testing.assert_array_equal(whole.q, blocked.q)
    np.testing.assert_array_equal(whole.scale, blocked.scale)


@given(weights(magnitudes=(0.5, 1.0)), st.sampled_from([8, 32]))
def test_signed8_maps_the_largest_magnitude_to_minus_8(w, group):
    quantized = quantize_weight(w, group, "signed8", np.float32)
    for g in range(quantized.scale.shape[0]):
        rows = slice(g * group, (g + 1) * group)
        for n in np.flatnonzero(w[rows].any(axis=0)):
            top = int(np.argmax(np.abs(w[rows, n])))
            assert quantized.q[rows, n][top] == -8
            assert np.sign(quantized.scale[g, n]) == -np.sign(w[rows, n][top])


@given(weights(magnitudes=(0.5, 1.0)), st.sampled_from([8, 32]))
def test_absmax7_is_the_published_grid(w, group):
    quantized = quantize_weight(w, group, "absmax7", np.float32)
    for g in range(quantized.scale.shape[0]):
        absmax = np.abs(w[g * group : (g + 1) * group]).max(axis=0)
        np.testing.assert_array_equal(quantized.scale[g], np.where(absmax == 0, 1, absmax / np.float32(7)))


@given(weights(magnitudes=(0.2, 1.0)), st.sampled_from([8, 32]), st.sampled_from(DTYPES))
def test_the_clip_searches_are_never_worse_in_their_own_measure(w, group, dtype):
    importance = np.random.default_rng(1).uniform(0, 3, w.shape[0])
    plain = [quantize_weight(w, group, grid, dtype) for grid in ("absmax7", "signed8")]
    clip = group_errors(w, quantize_weight(w, group, "mse_clip", dtype))
    weighted = quantize_weight(w, group, "weighted_clip", dtype, importance=importance)
    for other in plain:
        assert (clip <= group_errors(w, other) * (1 + 1e-4) + 1e-12).all()
        worse = group_errors(w, weighted, importance) - group_errors(w, other, importance) * (1 + 1e-4)
        assert (worse <= 1e-12).all()


def test_grids_rank_on_gaussian_weights_as_the_literature_says():
    w = np.random.default_rng(0).standard_normal((1024, 64)).astype(np.float32)
    error = {g: float(group_errors(w, quantize_weight(w, 128, g, np.float32)).sum()) / w.size for g in GRIDS[:3]}
    assert error["absmax7"] == pytest.approx(0.0138, rel=0.05)
    assert error["signed8"] == pytest.approx(0.0107, rel=0.05)
    assert error["mse_clip"] < 0.95 * error["signed8"]


@given(weights(), st.sampled_from([4, 32]), st.sampled_from(GRIDS[:3]), st.sampled_from(DTYPES))
def test_integer_structured_scales_are_exact_multiples(w, group, grid, dtype):
    scale = group_scales(w, group, grid, dtype, max_multiple=MAX_MULTIPLE).astype(np.float64)
    for column in scale.T:
        # some base in the column's span divides every scale exactly, with quotients 1..15
        top = np.abs(column).max()
        bases = [top / i for i in range(1, MAX_MULTIPLE + 1)]
        assert any(
            all((m := abs(s) / base) == round(m) and 1 <= m <= MAX_MULTIPLE for s in column)
            and all(float(np.asarray(base * i, dtype)) == base * i for i in range(1, MAX_MULTIPLE + 1))
            for base in bases
        )


def test_integer_structure_costs_little():
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((2048, 32)) * rng.lognormal(0, 0.3, (2048, 1))).astype(np.float32)
    free = group_errors(w, quantize_weight(w, 128, "signed8", np.float16)).sum()
    tied = group_errors(w, quantize_weight(w, 128, "signed8", np.float16, max_multiple=MAX_MULTIPLE)).sum()
    assert tied < 1.06 * free


@pytest.mark.parametrize("structured", [0, MAX_MULTIPLE])
@pytest.mark.parametrize("grid", GRIDS[:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [6e-8, 3e-7, 1e-5, 3e4, 65504.0])
def test_extreme_magnitudes_survive(dtype, grid, magnitude, structured):
    w = (np.linspace(-1, 1, 64, dtype=np.float32) * np.float32(magnitude)).reshape(64, 1)
    quantized = quantize_weight(w, 64, grid, dtype, max_multiple=structured)
    s = float(quantized.scale[0, 0].astype(np.float64))
    assert s != 0 and np.isfinite(np.asarray(-8 * s if grid != "absmax7" else 7 * s, dtype).astype(np.float64))
    step = max(abs(s), 2.0**-24 if dtype == np.float16 else 0)
    assert np.abs(w - quantized.dequantize()).max() <= 1.3 * step
    if magnitude > 1e-6:
        assert abs(s) <= 1.2 * magnitude / 7


def test_float16_refuses_what_it_cannot_hold():
    w = np.full((4, 1), 7e4, np.float32)
    quantize_weight(w, 4, "signed8", BFLOAT16)
    with pytest.raises(ModelError, match="does not fit float16"):
        quantize_weight(w, 4, "signed8", np.float16)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_named(bad):
    w = np.ones((4, 2), np.float32)
    w[1, 1] = bad
    with pytest.raises(ModelError, match="NaN or Inf"):
        quantize_weight(w, 4, "absmax7", np.float32)


def test_wrong_arguments():
    w = np.ones((4, 2), np.float32)
    with pytest.raises(TypeError, match="float64"):
        quantize_weight(w, 4, "absmax7", np.float64)
    with pytest.raises(ValueError, match="importance"):
        quantize_weight(w, 4, "weighted_clip", np.float32)


@given(hnp.arrays(np.int8, (9, 3), elements=st.integers(-8, 7)), st.sampled_from([2, 9, 16]))
def test_representable_weights_come_back_unchanged(q, group):
    scale = np.full((group_count(9, group), 3), 0.25, np.float32)
    np.testing.assert_array_equal(round_to_scales(dequantize(q, scale, group), scale, group), q)


@pytest.mark.parametrize("max_multiple", [0, MAX_MULTIPLE])
@pytest.mark.parametrize("grid", GRIDS)
def test_weights_whose_errors_overflow_are_rounded_all_the_same(grid, max_multiple):
    """No candidate is better than another where all squared errors are infinite; one of them it has to be."""
    w = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    w[3:6, 1] = 1e30, -0.66e30, 0.31e30
    importance = np.ones(64) if grid == "weighted_clip" else None
    quantized = quantize_weight(w, 32, grid, np.float32, importance=importance, max_multiple=max_multiple)
    np.testing.assert_allclose(quantized.dequantize()[3:6, 1], w[3:6, 1], rtol=0, atol=1.3e29)
    usual = quantize_weight(w[:, ::2], 32, grid, np.float32, importance=importance, max_multiple=max_multiple)
    np.testing.assert_array_equal(quantized.q[:, ::2], usual.q)
