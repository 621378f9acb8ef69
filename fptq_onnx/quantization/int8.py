"""Symmetric int8 weights with one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import ModelError
from fptq_onnx.quantization.float_types import float_type
from fptq_onnx.quantization.int4 import Float32

__all__ = ["Int8Weight", "quantize_int8"]

_LEVELS = 127


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """An int8 weight.

    Attributes:
        q: int8 [K, N], integers -127..127.
        scale: T [N], positive.
    """

    q: npt.NDArray[np.int8]
    scale: npt.NDArray[Any]

    def dequantize(self) -> Float32:
        """The represented weight, float32 [K, N]."""
        represented: Float32 = self.q.astype(np.float32) * self.scale.astype(np.float32)
        return represented


def quantize_int8(weight: Float32, scale_dtype: npt.DTypeLike) -> Int8Weight:
    """Round each column to the nearest multiples of its absmax / 127.

    Args:
        weight: float32 [K, N].
        scale_dtype: float16, bfloat16 (ml_dtypes) or float32.

    Raises:
        ModelError: The weight holds NaN or Inf.
    """
    stored = float_type(scale_dtype)
    absmax = np.abs(weight).max(axis=0, initial=0.0)
    if not np.isfinite(absmax).all():
        raise ModelError("weight", "it holds NaN or Inf", "Repair or re-export the model")
    exact = np.clip(absmax / np.float32(_LEVELS), stored.smallest_normal, stored.largest)
    scale = np.where(absmax == 0, np.float32(1), exact).astype(stored.dtype)
    # a scale that was rounded down clips what it cannot reach
    q = np.clip(np.rint(weight / scale.astype(np.float32)), -_LEVELS, _LEVELS).astype(np.int8)
    return Int8Weight(q, scale)
