import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.quantization.gptq import gptq
from fptq_onnx.quantization.int4 import quantize_weight
from fptq_onnx.quantization.rotate import (
    hadamard,
    random_rotation,
    rotate_head_inputs,
    rotate_head_outputs,
    rotate_inputs,
    rotate_outputs,
)

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 44, 64, 60, 576, 768, 896, 1152, 2560])
def test_hadamard(order):
    h = hadamard(order)
    assert set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("order", [0, 3, 6, 10, 18, 92])
def test_no_construction(order):
    assert hadamard(order) is None


@given(st.integers(1, 70), seeds)
def test_rotations_are_orthogonal_and_repeatable(size, seed):
    q = random_rotation(size, seed).matrix
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
    np.testing.assert_array_equal(q, random_rotation(size, seed).matrix)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70) | st.sampled_from([576, 1152, 1280, 1536, 2048]), st.integers(1, 5), seeds)
def test_products_by_factors_are_those_by_the_matrix(size, n, seed):
    rotation, rng = random_rotation(size, seed), np.random.default_rng(seed)
    x, gamma = rng.standard_normal((n, size)).astype(np.float32), rng.uniform(0.1, 3, size)
    q = rotation.matrix
    np.testing.assert_allclose(rotation.rotate_last(x), x @ q, atol=1e-5)
    np.testing.assert_allclose(rotation.rotate_first(x.T, gamma), q.T @ (gamma[:, None] * x.T), atol=1e-5)


@pytest.mark.parametrize("size", [12, 64, 576, 896, 1152, 1280, 2048])
def test_the_matrix_is_the_hadamard_matrix_with_signs(size):
    signs = np.random.default_rng(5).choice([-1.0, 1.0], size)
    np.testing.assert_allclose(random_rotation(size, 5).matrix, signs[:, None] * hadamard(size) / np.sqrt(size))


def test_an_outlier_channel_is_spread():
    h = np.random.default_rng(0).standard_normal((100, 576))
    h[:, 7] = 100
    assert np.abs(h @ random_rotation(576, 0).matrix).max() < 12


def rms_norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)


@given(st.sampled_from([4, 7, 12, 20]), seeds)
def test_a_residual_stream_in_rotated_coordinates_gives_the_same_answer(size, seed):
    rng = np.random.default_rng(seed)
    embedding, read, write = (rng.standard_normal(s).astype(np.float32) for s in [(9, size), (size, 5), (5, size)])
    gamma = rng.uniform(0.1, 3, size).astype(np.float32)
    q = random_rotation(size, seed)

    def network(embedding, gamma, read, write):
        h = embedding[[3, 1, 4]].astype(np.float64)
        h = h + np.tanh((rms_norm(h) * gamma) @ read) @ write
        return (rms_norm(h) * gamma) @ read

    expected = network(embedding, gamma, read, write)
    rotated = rotate_inputs(read, q, gamma)
    got = network(rotate_outputs(embedding, q), 1.0, rotated, rotate_outputs(write, q))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@given(st.sampled_from([2, 3, 8]), st.integers(1, 4), seeds)
def test_value_heads(d, heads, seed):
    rng = np.random.default_rng(seed)
    x, v = rng.standard_normal((6, 10)), rng.standard_normal((10, heads * d)).astype(np.float32)
    o = rng.standard_normal((heads * d, 4)).astype(np.float32)
    attention = rng.dirichlet(np.ones(6), (heads, 6))
    q = random_rotation(d, seed)

    def network(v, o):
        values = (x @ v).reshape(6, heads, d).transpose(1, 0, 2)
        return (attention @ values).transpose(1, 0, 2).reshape(6, heads * d) @ o

    np.testing.assert_allclose(network(rotate_head_outputs(v, q), rotate_head_inputs(o, q)), network(v, o), atol=1e-4)


def test_a_rotation_undoes_what_a_norm_weight_protects_and_gptq_repairs_part_of_it():
    """Attention sinks live in one channel of the stream that the norm's weight all but removes.

    Folded into the layer and rotated, the rounding errors of all channels meet the sink's full size again.
    """
    rng = np.random.default_rng(0)
    k, sinks = 128, 8
    h = rng.standard_normal((512, k)).astype(np.float32)
    h[:sinks, 17] = 100
    h /= np.sqrt(np.square(h).mean(axis=1, keepdims=True))
    gamma = np.ones(k, np.float32)
    gamma[17] = 0.01
    weight = rng.standard_normal((k, 64)).astype(np.float32)
    rotation = random_rotation(k, 0)
    turned, x = rotate_inputs(weight, rotation, gamma), rotation.rotate_last(h)
    wanted = h * gamma @ weight

    def error(outputs, tokens):
        return np.sum(np.square((outputs - wanted)[tokens])) / np.sum(np.square(wanted[tokens]))

    plain = h * gamma @ quantize_weight(weight, k, "signed8", np.float32).dequantize()
    nearest = x @ quantize_weight(turned, k, "signed8", np.float32).dequantize()
    refined = x @ gptq(turned, x.T @ x, k, "signed8", np.float32, damping=0.05, order="activation").dequantize()
    sink, others = slice(0, sinks), slice(sinks, None)
    assert error(nearest, others) == pytest.approx(error(plain, others), rel=0.2)
    assert error(nearest, sink) > 20 * error(plain, sink)
    assert error(refined, sink) < error(nearest, sink) / 2 and error(refined, others) < error(nearest, others)
