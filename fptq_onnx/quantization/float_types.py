"""The limits of the floating-point types that a model stores scales in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["FloatType", "float_type"]


@dataclass(frozen=True)
class FloatType:
    """One of the types T of a model.

    Attributes:
        dtype: The numpy type.
        bits: Bits of the significand, the hidden one included.
        largest: Largest finite value.
        smallest_normal: Smallest normal value.
        smallest_scale: Smallest magnitude a weight scale may take: the subnormal step for float16, whose subnormals
            are ordinary numbers once widened to float32; the smallest normal value for types of float32's exponent
            range, whose subnormals kernels may flush to zero.
    """

    dtype: np.dtype[Any]
    bits: int
    largest: float
    smallest_normal: float
    smallest_scale: float


_TYPES = {
    t.dtype: t
    for t in (
        FloatType(np.dtype(np.float16), 11, 65504.0, 2.0**-14, 2.0**-24),
        FloatType(np.dtype(ml_dtypes.bfloat16), 8, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-126),
        FloatType(np.dtype(np.float32), 24, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-126),
    )
}


def float_type(dtype: npt.DTypeLike) -> FloatType:
    """The limits of float16, bfloat16 (ml_dtypes) or float32; TypeError for another type."""
    found = _TYPES.get(np.dtype(dtype))
    if found is None:
        raise TypeError(f"expected float16, bfloat16 or float32, not {np.dtype(dtype)}")
    return found
