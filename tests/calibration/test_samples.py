"""A sample of tokens, taken inside the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st
from whole_model import observe

from fptq_onnx.calibration.samples import SampleObserver, sample_stride

K = 3


def test_every_third_token_of_each_batch_from_the_first_on() -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 21]>
        g (float[b, s, {K}] x) => (float[b, s, {K}] y) {{
            hidden = Neg(x)
            y = Abs(hidden)
        }}""")
    batches = [np.random.default_rng(i).standard_normal((1, n, K)).astype(np.float32) for i, n in enumerate((7, 2))]
    observer = SampleObserver("hidden", 3)
    observe(model, [observer], [{"x": batch} for batch in batches])
    np.testing.assert_array_equal(observer.sample, np.concatenate([-batches[0][0, ::3], -batches[1][0, ::3]]))


@given(st.integers(1, 1000), st.integers(1, 50), st.integers(1, 600))
def test_a_stride_keeps_about_as_many_as_wanted_and_more_than_the_first_of_a_batch(
    wanted: int, batches: int, length: int
) -> None:
    stride = sample_stride(wanted, batches, batches * length)
    kept = batches * -(-length // stride)
    assert kept >= min(wanted, batches * length)
    assert kept >= batches * min(4, length)
    assert stride == 1 or kept <= max(2 * wanted + batches, 8 * batches)
