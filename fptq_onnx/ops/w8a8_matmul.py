"""W8A8MatMul: uint8 activations times int8 weights with one scale per output channel.

``Y = T(float32(sum_k (A - a_zero_point)[..., k] * B[k, n]) * float32(b_scale[n]) * a_scale)``. The sum is an exact
integer; the two products are rounded to float32 in this order, so that every implementation gives the same bytes.

=============  ===========================  =====================================================================
input          type                         shape
=============  ===========================  =====================================================================
A              uint8                        [..., K], rank 1 or more
a_scale        float32                      [] or [1] (static), or [..., 1] (one per row)
a_zero_point   uint8                        [] or [1]; 128 for symmetric quantization
B              int8, constant               [K, N], row-major, -128..127; K at most 65535
b_scale        T, constant                  [N], any sign
Y              T                            [..., N]; T is float32, float16 or bfloat16
=============  ===========================  =====================================================================

For layers that four bits would hurt: the vocabulary head, and a fall-back for others. A model whose head is tied to
the embedding table can keep one int8 table for both: ``Gather(B, ids, axis=1)`` gives the rows of the embedding,
[K, ...], to be transposed, cast and multiplied by ``Gather(b_scale, ids)``.
"""

from __future__ import annotations

__all__ = ["NAME", "function", "reference", "w8a8_matmul"]

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.ops.domain import function_from_text
from fptq_onnx.ops.matmul_node import matmul_node

NAME = "W8A8MatMul"

# The weight becomes uint8 around 128, once, at session creation: onnxruntime's uint8 x int8 products saturate on CPUs
# without VNNI.
_BODY = f"""
{NAME} (A, a_scale, a_zero_point, B, b_scale) => (Y)
{{
  digits = Cast <to = 6> (B)
  centre_int = Constant <value = int32 {{128}}> ()
  shifted = Add (digits, centre_int)
  weight = Cast <to = 2> (shifted)
  centre = Constant <value = uint8 {{128}}> ()
  integers = MatMulInteger (A, weight, a_zero_point, centre)
  sums = Cast <to = 1> (integers)
  scale = Cast <to = 1> (b_scale)
  product = Mul (sums, scale)
  scaled = Mul (product, a_scale)
  Y = CastLike (scaled, b_scale)
}}
"""


def function() -> ir.Function:
    """Return the op as a function of standard ONNX operators, for runtimes without the op library."""
    return function_from_text(_BODY)


def w8a8_matmul(
    a: ir.Value,
    a_scale: ir.Value,
    a_zero_point: ir.Value,
    b: ir.Value,
    b_scale: ir.Value,
    *,
    name: str | None = None,
) -> ir.Node:
    """Build a W8A8MatMul node (see the module docstring for types and shapes).

    Returns:
        The node; its single output has the type of ``b_scale`` and, where A's shape is known, a shape.
    """
    return matmul_node(NAME, [a, a_scale, a_zero_point, b, b_scale], name=name)


def reference(
    a: npt.NDArray[np.uint8],
    a_scale: npt.NDArray[np.float32] | float,
    a_zero_point: int,
    b: npt.NDArray[np.int8],
    b_scale: npt.NDArray[np.generic],
) -> npt.NDArray[np.generic]:
    """Compute the op bit-exactly.

    Args:
        a: Activations, uint8 [..., K].
        a_scale: float32 [] or [1] or [..., 1].
        a_zero_point: 0..255.
        b: Weights, int8 [K, N].
        b_scale: Scales [N] in T: float32, float16 or bfloat16.

    Returns:
        T [..., N].
    """
    sums = (a.astype(np.int64) - int(a_zero_point)) @ b.astype(np.int64)
    product = sums.astype(np.float32) * b_scale.astype(np.float32)
    return np.asarray(product * np.asarray(a_scale, dtype=np.float32)).astype(b_scale.dtype)
