"""DynamicQuantizePerToken: uint8 activations with one scale per row, zero point 128.

``scale = max_k |X| / 127`` in float32, or 1 where that is 0; ``Y = clip(round_half_even(X / scale), -127, 127) + 128``.
X is T [..., K] (float32, float16 or bfloat16), Y uint8 [..., K] in 1..255, scale float32 [..., 1]. A row that holds NaN
or infinity gets scale NaN and Y = 128, so that whatever is computed from it is NaN.
"""

from __future__ import annotations

__all__ = ["NAME", "ZERO_POINT", "body_steps", "dynamic_quantize_per_token", "function", "reference"]

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.ops.domain import DOMAIN, function_from_text

NAME = "DynamicQuantizePerToken"
ZERO_POINT = 128

# x * 0 is NaN exactly where x is not finite, so its row sum tells rows that hold NaN or infinity. onnxruntime's
# reductions of an empty [0, K] give [0, K] instead of [0, 1]; the Slice, otherwise without effect, repairs that.
_STEPS = """
  last = Constant <value_ints = [-1]> ()
  start = Constant <value_ints = [0]> ()
  end = Constant <value_ints = [1]> ()
  zero = Constant <value_float = 0.0> ()
  one = Constant <value_float = 1.0> ()
  largest = Constant <value_float = 127.0> ()
  smallest = Constant <value_float = -127.0> ()
  zero_point = Constant <value_float = 128.0> ()
  magnitude = Abs (x)
  reduced_max = ReduceMax <keepdims = 1> (magnitude, last)
  row_max = Slice (reduced_max, start, end, last)
  step = Div (row_max, largest)
  is_zero = Equal (step, zero)
  finite_scale = Where (is_zero, one, step)
  probe = Mul (x, zero)
  reduced_probe = ReduceSum <keepdims = 1> (probe, last)
  row_probe = Slice (reduced_probe, start, end, last)
  is_bad = IsNaN (row_probe)
  {scale} = Where (is_bad, row_probe, finite_scale)
  ratio = Div (x, finite_scale)
  rounded = Round (ratio)
  usable = Where (is_bad, zero, rounded)
  clipped = Clip (usable, smallest, largest)
  shifted = Add (clipped, zero_point)
  {quantized} = Cast <to = 2> (shifted)
"""


def body_steps(quantized: str = "Y", scale: str = "scale") -> str:
    """Return the nodes of a function body that quantize float32 x, as text.

    Args:
        quantized: Name of the uint8 result.
        scale: Name of the float32 scale.
    """
    return _STEPS.format(quantized=quantized, scale=scale)


def function() -> ir.Function:
    """Return the op as a function of standard ONNX operators, for runtimes without the op library."""
    return function_from_text(f"{NAME} (X) => (Y, scale)\n{{\n  x = Cast <to = 1> (X)\n{body_steps()}\n}}")


def dynamic_quantize_per_token(x: ir.Value, *, name: str | None = None) -> ir.Node:
    """Build a DynamicQuantizePerToken node.

    Args:
        x: The activation, T [..., K].
        name: Name of the node.

    Returns:
        The node; outputs are the uint8 values and the float32 scale, with shapes where that of ``x`` is known.
    """
    node = ir.node(NAME, [x], domain=DOMAIN, name=name, num_outputs=2)
    quantized, scale = node.outputs
    quantized.type = ir.TensorType(ir.DataType.UINT8)
    scale.type = ir.TensorType(ir.DataType.FLOAT)
    if x.shape is not None:
        quantized.shape = x.shape.copy()
        scale.shape = ir.Shape([*x.shape[:-1], 1])
    return node


def reference(x: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Compute the op bit-exactly.

    Args:
        x: Activations [..., K] in float32, float16 or bfloat16.

    Returns:
        uint8 [..., K] and float32 [..., 1].
    """
    values = np.asarray(x).astype(np.float32)
    finite = np.isfinite(values).all(axis=-1, keepdims=True)
    usable = np.where(finite, values, np.float32(0))
    step = np.abs(usable).max(axis=-1, keepdims=True) / np.float32(127)
    scale = np.where(step == 0, np.float32(1), step)
    quantized = np.clip(np.rint(usable / scale), -127, 127) + ZERO_POINT
    return quantized.astype(np.uint8), np.where(finite, scale, np.float32(np.nan))
