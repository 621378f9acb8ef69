"""Two int4 values to a byte, as ONNX stores them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["pack_int4", "unpack_int4"]

Int8 = npt.NDArray[np.int8]
Uint8 = npt.NDArray[np.uint8]


def pack_int4(integers: Int8) -> Uint8:
    """Pack int8 values in -8..7, row-major, low nibble first; an odd number of them is filled up with a zero.

    Returns:
        uint8 [ceil(size / 2)].
    """
    flat = np.ascontiguousarray(integers, dtype=np.int8).reshape(-1).view(np.uint8) & np.uint8(0x0F)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << np.uint8(4))


def unpack_int4(packed: Uint8, shape: tuple[int, ...]) -> Int8:
    """Undo `pack_int4`: int8 of a shape."""
    flat = np.empty(2 * packed.size, np.int8)
    # Shifting an int8 to the right keeps its sign.
    flat[0::2] = (packed << np.uint8(4)).view(np.int8) >> 4
    flat[1::2] = packed.view(np.int8) >> 4
    return flat[: math.prod(shape)].reshape(shape)
