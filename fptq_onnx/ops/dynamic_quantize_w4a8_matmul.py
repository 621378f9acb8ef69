"""DynamicQuantizeW4A8MatMul: DynamicQuantizePerToken and W4A8MatMul in one op, float activations in and out.

``Y = W4A8MatMul(A, a_scale, 128, B, b_scale)`` with ``A, a_scale = DynamicQuantizePerToken(X)``: the same bytes.

=============  ===========================  =====================================================================
input          type                         shape
=============  ===========================  =====================================================================
X              T                            [..., K], rank 1 or more; T is float32, float16 or bfloat16
B              int4, constant               [K, N], row-major, -8..7
b_scale        T, constant                  [ceil(K / block_size), N], any sign; the last group may be short
Y              T                            [..., N]; NaN in the rows of X that hold NaN or infinity
=============  ===========================  =====================================================================

Attributes: ``block_size`` and ``scale_max_multiple`` as of W4A8MatMul.
"""

from __future__ import annotations

__all__ = ["NAME", "dynamic_quantize_w4a8_matmul", "function", "integer_scales_function", "reference"]

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.ops import dynamic_quantize_per_token, w4a8_matmul
from fptq_onnx.ops.matmul_node import matmul_node

NAME = "DynamicQuantizeW4A8MatMul"

_QUANTIZE = f"""
  x = Cast <to = 1> (X)
{dynamic_quantize_per_token.body_steps("A", "a_scale")}
  a_zero_point = Constant <value = uint8 {{{dynamic_quantize_per_token.ZERO_POINT}}}> ()
"""


def function() -> ir.Function:
    """Return the op as a function of standard ONNX operators, for runtimes without the op library."""
    return w4a8_matmul.function_of(NAME, "X, B, b_scale", first=_QUANTIZE)


def integer_scales_function() -> ir.Function:
    """Return the op's overload for integer-structured scales: bit for bit what the kernels compute."""
    return w4a8_matmul.function_of(NAME, "X, B, b_scale", first=_QUANTIZE, overload=w4a8_matmul.INTEGER_SCALES)


def dynamic_quantize_w4a8_matmul(
    x: ir.Value,
    b: ir.Value,
    b_scale: ir.Value,
    *,
    block_size: int,
    scale_max_multiple: int = 0,
    name: str | None = None,
) -> ir.Node:
    """Build a DynamicQuantizeW4A8MatMul node (see the module docstring for types and shapes).

    Returns:
        The node; its single output has the type of ``b_scale`` and, where X's shape is known, a shape.
    """
    return matmul_node(
        NAME,
        [x, b, b_scale],
        attributes={"block_size": block_size, "scale_max_multiple": scale_max_multiple},
        overload=w4a8_matmul.INTEGER_SCALES if scale_max_multiple else "",
        name=name,
    )


def reference(
    x: npt.NDArray[np.generic], b: npt.NDArray[np.integer], b_scale: npt.NDArray[np.generic], block_size: int
) -> npt.NDArray[np.float64]:
    """Compute the op: activations bit-exactly, integer group sums in int64, everything after them in float64.

    Args:
        x: Activations [..., K] in float32, float16 or bfloat16.
        b: Weights [K, N], -8..7.
        b_scale: Group scales [G, N] in the type of ``x``.
        block_size: Rows of ``b`` per group.

    Returns:
        float64 [..., N], not rounded to T.
    """
    a, a_scale = dynamic_quantize_per_token.reference(x)
    return w4a8_matmul.reference(a, a_scale, dynamic_quantize_per_token.ZERO_POINT, b, b_scale, block_size)
