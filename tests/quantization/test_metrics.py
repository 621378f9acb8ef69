import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_onnx.quantization.metrics import relative_mse, snr_db

arrays = hnp.arrays(np.float32, 7, elements=st.floats(-1024, 1024, width=16))


@given(arrays, arrays)
def test_relative_mse_matches_its_definition(x, y):
    if not x.any():
        assert relative_mse(x, y) == (0.0 if not y.any() else np.inf)
        return
    expected = sum((float(b) - float(a)) ** 2 for a, b in zip(x, y, strict=True)) / sum(float(a) ** 2 for a in x)
    assert relative_mse(x, y) == pytest.approx(expected, rel=1e-9)
    assert snr_db(x, y) == pytest.approx(-10 * np.log10(expected) if expected else np.inf)


def test_known_values():
    x = np.array([3.0, 4.0])
    assert relative_mse(x, np.zeros(2)) == 1
    assert snr_db(x, x * 1.1) == pytest.approx(20)
    assert snr_db(x, x) == np.inf


def test_a_non_finite_answer_never_wins():
    assert relative_mse(np.ones(2), np.array([1.0, np.nan])) == np.inf
    assert snr_db(np.ones(2), np.array([1.0, np.inf])) == -np.inf
