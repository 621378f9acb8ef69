"""W4A8MatMul: uint8 activations times int4 weights with group scales.

``Y = a_scale * sum_g b_scale[g, n] * sum_{k in group g} (A - a_zero_point)[..., k] * B[k, n]``, inner sums in integers.

=============  ===========================  =====================================================================
input          type                         shape
=============  ===========================  =====================================================================
A              uint8                        [..., K], rank 1 or more
a_scale        float32                      [] or [1] (static), or [..., 1] (one per row)
a_zero_point   uint8                        [] or [1]; 128 for symmetric quantization
B              int4, constant               [K, N], row-major, -8..7
b_scale        T, constant                  [ceil(K / block_size), N], any sign; the last group may be short
Y              T                            [..., N]; T is float32, float16 or bfloat16
=============  ===========================  =====================================================================

Attributes: ``block_size`` (1..K; K means per channel) and ``scale_max_multiple`` (0, or m in 1..15: every column's
scales are base * i with integers |i| <= m, which lets kernels stay in integers over all of K).
"""

from __future__ import annotations

__all__ = [
    "INTEGER_SCALES",
    "NAME",
    "function",
    "function_of",
    "group_sums",
    "integer_scales_function",
    "reference",
    "w4a8_matmul",
]

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.ops.domain import function_from_text
from fptq_onnx.ops.matmul_node import matmul_node

NAME = "W4A8MatMul"

INTEGER_SCALES = "integer_scales"
"""Overload of nodes whose ``scale_max_multiple`` is not 0: the same op, with a function body that stays in integers."""

# The product is float32 for every T: CPU and CUDA providers have float32 kernels for all of these, float16 and bfloat16
# differ by version. At optimisation level EXTENDED and above onnxruntime turns DequantizeLinear + MatMul into its own
# MatMulNBits; the session entry "session.qdq_matmulnbits_accuracy_level" = "0" keeps the numerics written here.
_FLOAT_STEPS = """
  wide_b_scale = Cast <to = 1> (b_scale)
  weight = DequantizeLinear <axis = 0, block_size: int = @block_size> (B, wide_b_scale)
  wide_a = Cast <to = 1> (A)
  wide_zero_point = Cast <to = 1> (a_zero_point)
  centered = Sub (wide_a, wide_zero_point)
  product = MatMul (centered, weight)
  scaled = Mul (product, a_scale)
  Y = CastLike (scaled, b_scale)
"""

# base[n] = max_g |b_scale| / d, d the smallest integer for which all scales of the column are exact multiples (the rule
# of the kernels, include/fptq/integer_scales.h); a column without one comes out as NaN. What leads to `weight` depends
# on constants only, so onnxruntime computes it once, at session creation. The rest has one order of operations and
# integer sums: every runtime and every kernel of the op library gives the same bits. Weights are uint8 around 128,
# because onnxruntime's uint8 x int8 products saturate on CPUs without VNNI. (onnx's ReferenceEvaluator cannot tell
# overloads apart: it runs models whose nodes are all of one kind.)
_INTEGER_STEPS = """
  wide_b_scale = Cast <to = 1> (b_scale)
  b_scale_magnitude = Abs (wide_b_scale)
  first_axis = Constant <value = int64[1] {0}> ()
  second_axis = Constant <value = int64[1] {1}> ()
  peak = ReduceMax <keepdims = 1> (b_scale_magnitude, first_axis)
  nothing = Constant <value = float {0}> ()
  unit = Constant <value = float {1}> ()
  silent = Equal (peak, nothing)
  known_peak = Where (silent, unit, peak)
  divisors = Constant <value = float[15, 1, 1] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}> ()
  bases = Div (known_peak, divisors)
  ratios = Div (wide_b_scale, bases)
  integers = Round (ratios)
  products = Mul (integers, bases)
  equal = Equal (products, wide_b_scale)
  equal_groups = Cast <to = 1> (equal)
  equal_columns = ReduceMin <keepdims = 1> (equal_groups, second_axis)
  exact = Cast <to = 9> (equal_columns)
  too_large = Constant <value = float {16}> ()
  candidates = Where (exact, divisors, too_large)
  divisor = ReduceMin <keepdims = 0> (candidates, first_axis)
  structured = Less (divisor, too_large)
  found = Div (known_peak, divisor)
  none = Div (nothing, nothing)
  base = Where (structured, found, none)
  multiple_float = Div (wide_b_scale, base)
  multiple_rounded = Round (multiple_float)
  multiple = Cast <to = 6> (multiple_rounded)
  digits = Cast <to = 6> (B)
  shape = Shape <start = 0, end = 1> (digits)
  first_row = Constant <value = int64 {0}> ()
  next_row = Constant <value = int64 {1}> ()
  k = Squeeze (shape)
  rows = Range (first_row, k, next_row)
  block = Constant <value_int: int = @block_size> ()
  group = Div (rows, block)
  multiples = Gather (multiple, group)
  signed = Mul (digits, multiples)
  centre_int = Constant <value = int32 {128}> ()
  offset_digits = Add (signed, centre_int)
  weight = Cast <to = 2> (offset_digits)
  centre = Constant <value = uint8 {128}> ()
  sum = MatMulInteger (A, weight, a_zero_point, centre)
  sum_float = Cast <to = 1> (sum)
  product = Mul (sum_float, base)
  scaled = Mul (product, a_scale)
  Y = CastLike (scaled, b_scale)
"""


def function() -> ir.Function:
    """Return the op as a function of standard ONNX operators, for runtimes without the op library."""
    return function_of(NAME, "A, a_scale, a_zero_point, B, b_scale")


def integer_scales_function() -> ir.Function:
    """Return the op's overload for integer-structured scales: bit for bit what the kernels compute."""
    return function_of(NAME, "A, a_scale, a_zero_point, B, b_scale", overload=INTEGER_SCALES)


def function_of(name: str, inputs: str, *, first: str = "", overload: str = "") -> ir.Function:
    """Return the product as the function of an op with these weights and attributes.

    Args:
        name: Of the op.
        inputs: Its inputs, B and b_scale among them.
        first: Nodes that compute A, a_scale and a_zero_point where these are no inputs.
        overload: INTEGER_SCALES for the body that stays in integers.
    """
    steps = _INTEGER_STEPS if overload == INTEGER_SCALES else _FLOAT_STEPS
    attributes = "<block_size, scale_max_multiple: int = 0>"
    return function_from_text(f"{name} {attributes} ({inputs}) => (Y)\n{{{first}{steps}}}", overload=overload)


def w4a8_matmul(
    a: ir.Value,
    a_scale: ir.Value,
    a_zero_point: ir.Value,
    b: ir.Value,
    b_scale: ir.Value,
    *,
    block_size: int,
    scale_max_multiple: int = 0,
    name: str | None = None,
) -> ir.Node:
    """Build a W4A8MatMul node (see the module docstring for types and shapes).

    Returns:
        The node; its single output has the type of ``b_scale`` and, where A's shape is known, a shape.
    """
    return matmul_node(
        NAME,
        [a, a_scale, a_zero_point, b, b_scale],
        attributes={"block_size": block_size, "scale_max_multiple": scale_max_multiple},
        overload=INTEGER_SCALES if scale_max_multiple else "",
        name=name,
    )


def group_sums(
    a: npt.NDArray[np.uint8], a_zero_point: int, b: npt.NDArray[np.integer], block_size: int
) -> npt.NDArray[np.int64]:
    """Compute the exact integer sums of each group.

    Args:
        a: Activations [..., K].
        a_zero_point: Subtracted from ``a``, 0..255.
        b: Weights [K, N], -8..7.
        block_size: Rows of ``b`` per group; the last group may be short.

    Returns:
        int64 [..., G, N] with G = ceil(K / block_size).
    """
    centered = a.astype(np.int64) - int(a_zero_point)
    weight = b.astype(np.int64)
    starts = range(0, weight.shape[0], block_size)
    return np.stack([centered[..., k : k + block_size] @ weight[k : k + block_size] for k in starts], axis=-2)


def reference(
    a: npt.NDArray[np.uint8],
    a_scale: npt.NDArray[np.float32] | float,
    a_zero_point: int,
    b: npt.NDArray[np.integer],
    b_scale: npt.NDArray[np.generic],
    block_size: int,
) -> npt.NDArray[np.float64]:
    """Compute the op: integer group sums in int64, everything after them in float64.

    Args:
        a: Activations, uint8 [..., K].
        a_scale: float32 [] or [1] or [..., 1].
        a_zero_point: 0..255.
        b: Weights [K, N], -8..7.
        b_scale: Group scales [G, N] in float32, float16 or bfloat16.
        block_size: Rows of ``b`` per group.

    Returns:
        float64 [..., N], not rounded to T.
    """
    sums = group_sums(a, a_zero_point, b, block_size)
    product = (sums * b_scale.astype(np.float64)).sum(axis=-2)
    return np.asarray(np.asarray(a_scale, dtype=np.float64) * product)
