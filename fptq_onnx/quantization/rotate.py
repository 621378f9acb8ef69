"""Orthogonal rotations that spread outlier channels over all channels and fold into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Rotation",
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

# Up to here one matrix product is as fast as several by its factors.
_LARGEST_DENSE = 1024
# Above, up to 2^6 = 64 channels are mixed by one matrix product.
_LARGEST_DOUBLINGS = 6
# Entries that are held in float64 at a time.
_CHUNK = 1 << 22


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


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (F_1 x F_2 x ...), x being the Kronecker product.

    A product with it costs rows * size * (f_1 + f_2 + ...) multiplications instead of rows * size^2: 128 instead of
    4096 per entry of a model of 4096 channels.

    Attributes:
        signs: float64 [size], the factor in front.
        factors: float64 matrices [f, f], whose orders multiply to the size.
    """

    signs: Float64
    factors: tuple[Float64, ...]

    @property
    def size(self) -> int:
        """Order of the matrix."""
        return int(self.signs.size)

    @property
    def matrix(self) -> Float64:
        """Q itself, float64 [size, size]."""
        product = np.ones((1, 1))
        for factor in self.factors:
            product = np.kron(product, factor).astype(np.float64)
        signed: Float64 = self.signs[:, None] * product
        return signed

    def rotate_last(self, x: FloatArray) -> Float32:
        """X Q over the last axis, computed in float64 a few rows at a time."""
        rows = x.reshape(-1, self.size)
        result = np.empty(rows.shape, np.float32)
        for chunk in _chunks(*rows.shape):
            result[chunk] = _last_axis(rows[chunk] * self.signs, self.factors)
        return result.reshape(x.shape)

    def rotate_first(self, x: FloatArray, gamma: Float64 | None = None) -> Float32:
        """Q^T diag(gamma) X for X [size, N], computed in float64 a few columns at a time."""
        scale: Float64 = self.signs if gamma is None else np.multiply(self.signs, gamma, dtype=np.float64)
        result = np.empty(x.shape, np.float32)
        for columns in _chunks(*x.shape[::-1]):
            result[:, columns] = _last_axis(x[:, columns].T * scale, self.factors).T
        return result


def _chunks(count: int, size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(size, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _last_axis(rows: Float64, factors: Sequence[Float64]) -> Float64:
    """Rows [n, f_1 * f_2 * ...] times the Kronecker product of the factors."""
    n, size = rows.shape
    for factor in reversed(factors):
        # The axis of this factor comes last; behind all factors the axes are back in their order.
        order = factor.shape[0]
        product = rows.reshape(-1, order) @ factor
        rows = np.ascontiguousarray(product.reshape(n, size // order, order).transpose(0, 2, 1))
    return rows.reshape(n, size)


def random_rotation(size: int, seed: int) -> Rotation:
    """A random orthogonal matrix: a Hadamard matrix with random row signs (QuIP#, QuaRot), scaled to norm 1.

    Where no Hadamard matrix of the size is at hand, the Q of a Gaussian matrix's QR decomposition, which spreads
    outliers almost as well.
    """
    rng = np.random.default_rng(seed)
    factors = _hadamard_factors(size)
    if factors is not None:
        return Rotation(rng.choice([-1.0, 1.0], size) / np.sqrt(size), tuple(factors))
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return Rotation(np.ones(size), (q * np.sign(np.diag(r)),))


def _hadamard_factors(order: int) -> list[Float64] | None:
    """Matrices whose Kronecker product is `hadamard(order)`: powers of two, then what Paley's constructions give."""
    base = order
    while order > _LARGEST_DENSE and base > 1 and base % 2 == 0 and _hadamard(base // 2) is not None:
        base //= 2
    doublings = (order // base).bit_length() - 1
    parts = -(-doublings // _LARGEST_DOUBLINGS)
    # Of about equal size: thin factors cost a pass over memory each and hardly any arithmetic.
    orders = [2 ** (doublings // parts + (part < doublings % parts)) for part in range(parts)]
    matrices = [hadamard(size) for size in ([*orders, base] if base > 1 or not orders else orders)]
    return None if any(matrix is None for matrix in matrices) else [matrix for matrix in matrices if matrix is not None]


def rotate_inputs(weight: Float32, rotation: Rotation, gamma: FloatArray | None = None) -> Float32:
    """Q^T diag(gamma) W: the weight that reads h Q instead of h * gamma.

    RMSNorm without its weight commutes with a rotation, RMS(h Q) = RMS(h) Q, so its weight gamma moves into the linear
    layers that read it first. LayerNorm also subtracts the mean, which a rotation does not preserve.

    Args:
        weight: float32 [K, N].
        rotation: Of order K.
        gamma: [K], the norm weight to fold, or None.
    """
    return rotation.rotate_first(weight, None if gamma is None else np.asarray(gamma, np.float64))


def rotate_outputs(weight: Float32, rotation: Rotation) -> Float32:
    """W Q for a weight [K, N] (or an embedding table) that writes to the rotated stream; biases rotate alike."""
    return rotation.rotate_last(weight)


def rotate_head_outputs(weight: Float32, rotation: Rotation) -> Float32:
    """Rotate the columns of v_proj, [K, heads * d], head by head with one rotation of order d."""
    k, n = weight.shape
    return rotation.rotate_last(weight.reshape(k, n // rotation.size, rotation.size)).reshape(k, n)


def rotate_head_inputs(weight: Float32, rotation: Rotation) -> Float32:
    """Undo `rotate_head_outputs` in the rows of o_proj, [heads * d, N]: attention mixes tokens, never channels."""
    k, n = weight.shape
    heads = weight.reshape(k // rotation.size, rotation.size, n)
    return np.stack([rotation.rotate_first(head) for head in heads]).reshape(k, n)
