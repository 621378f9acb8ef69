"""Orthogonal rotations that spread outlier channels over all channels and fold into the weights."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "hadamard",
    "random_rotation",
    "rotate_head_inputs",
    "rotate_head_outputs",
    "rotate_inputs",
    "rotate_outputs",
]

FloatArray = npt.NDArray[np.floating[Any]]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def hadamard(order: int) -> Float64 | None:
    """A matrix of +-1 with H H^T = order * I, or None where no construction known here reaches the order.

    Sylvester's doubling on top of Paley's two constructions over prime fields: every power of two, 12, 20, 24, 28, 36,
    40, 44, 48, ... times powers of two. That covers the hidden sizes 576 = 16 * 36, 896 = 32 * 28, 2560 = 128 * 20.
    """
    found = _hadamard(order)
    return None if found is None else found.astype(np.float64)


@lru_cache(maxsize=8)
def _hadamard(order: int) -> npt.NDArray[np.int8] | None:
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    if order < 4 or order % 4:
        return None
    half = _hadamard(order // 2)
    if half is not None:
        return np.kron(np.array([[1, 1], [1, -1]], np.int8), half)
    if (order - 1) % 4 == 3 and _is_prime(order - 1):
        skew = _jacobsthal_border(order - 1, -1)
        return skew + np.eye(order, dtype=np.int8)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        conference = _jacobsthal_border(q, 1)
        eye = np.eye(q + 1, dtype=np.int8)
        return np.kron(conference, np.array([[1, 1], [1, -1]], np.int8)) + np.kron(
            eye, np.array([[1, -1], [-1, -1]], np.int8)
        )
    return None


def _jacobsthal_border(q: int, sign: int) -> npt.NDArray[np.int8]:
    """Paley's bordered matrix of quadratic characters over the prime field of q elements, first column times sign."""
    character = np.full(q, -1, np.int8)
    character[np.arange(q) ** 2 % q] = 1
    character[0] = 0
    bordered = np.zeros((q + 1, q + 1), np.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = sign
    bordered[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    return bordered


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % d for d in range(2, int(value**0.5) + 1))


def random_rotation(size: int, seed: int) -> Float64:
    """An orthogonal matrix [size, size]: a Hadamard matrix with random row signs (QuIP#, QuaRot), scaled to norm 1.

    Where no Hadamard matrix of the size is at hand, the Q of a Gaussian matrix's QR decomposition, which spreads
    outliers almost as well.
    """
    rng = np.random.default_rng(seed)
    h = hadamard(size)
    if h is not None:
        h *= rng.choice([-1.0, 1.0], size)[:, None] / np.sqrt(size)
        return h
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    oriented: Float64 = q * np.sign(np.diag(r))
    return oriented


def rotate_inputs(weight: Float32, rotation: Float64, gamma: FloatArray | None = None) -> Float32:
    """Q^T diag(gamma) W: the weight that reads h Q instead of h * gamma.

    RMSNorm without its weight commutes with a rotation, RMS(h Q) = RMS(h) Q, so its weight gamma moves into the linear
    layers that read it first. LayerNorm also subtracts the mean, which a rotation does not preserve.

    Args:
        weight: float32 [K, N].
        rotation: Orthogonal [K, K].
        gamma: [K], the norm weight to fold, or None.
    """
    w = weight.astype(np.float64)
    if gamma is not None:
        w *= np.asarray(gamma, np.float64)[:, None]
    rotated: Float32 = (rotation.T @ w).astype(np.float32)
    return rotated


def rotate_outputs(weight: Float32, rotation: Float64) -> Float32:
    """W Q for a weight [K, N] (or an embedding table) that writes to the rotated stream; biases rotate alike."""
    return (weight.astype(np.float64) @ rotation).astype(np.float32)


def unrotate(rotation: Float64, gamma: FloatArray) -> Float32:
    """Q^T diag(gamma) [K, K]: takes the last norm of a rotated stream back to what the float model's head reads.

    With it a head that is tied to the embedding stays as it is: RMS(h Q) Q^T diag(gamma) = RMS(h) * gamma. The table
    likewise stays when its output is multiplied by Q. Both products together cost 2 K^2 against the K * vocabulary of
    the head.
    """
    restored: Float32 = (rotation.T * np.asarray(gamma, np.float64)).astype(np.float32)
    return restored


def rotate_head_outputs(weight: Float32, rotation: Float64) -> Float32:
    """Rotate the columns of v_proj, [K, heads * d], head by head with one [d, d] rotation."""
    k, n = weight.shape
    d = rotation.shape[0]
    heads = weight.astype(np.float64).reshape(k, n // d, d)
    return (heads @ rotation).reshape(k, n).astype(np.float32)


def rotate_head_inputs(weight: Float32, rotation: Float64) -> Float32:
    """Undo `rotate_head_outputs` in the rows of o_proj, [heads * d, N]: attention mixes tokens, never channels."""
    k, n = weight.shape
    d = rotation.shape[0]
    heads = weight.astype(np.float64).reshape(k // d, d, n)
    return (rotation.T @ heads).reshape(k, n).astype(np.float32)
