import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.errors import ModelError
from fptq_onnx.quantization.int8 import quantize_int8

weights = hnp.arrays(np.float32, (5, 3), elements=st.floats(-100, 100, width=32))


@given(weights, st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_every_value_is_within_half_a_step_of_its_column(weight, dtype):
    stored = quantize_int8(weight, dtype)
    assert stored.q.dtype == np.int8 and stored.scale.dtype == dtype and stored.scale.shape == (3,)
    scale = stored.scale.astype(np.float32)
    assert (scale > 0).all()
    # a rounded scale may fall short of the largest value by its own rounding
    slack = 127 * {2: 2.0**-8, 4: 1e-6}[np.dtype(dtype).itemsize]
    assert (np.abs(stored.dequantize() - weight) <= scale * (0.501 + slack)).all()


def test_zero_columns_stay_zero():
    stored = quantize_int8(np.zeros((4, 2), np.float32), np.float16)
    assert (stored.q == 0).all() and (stored.scale == 1).all()


def test_not_finite_is_refused():
    with pytest.raises(ModelError, match="NaN or Inf"):
        quantize_int8(np.full((2, 2), np.nan, np.float32), np.float32)
