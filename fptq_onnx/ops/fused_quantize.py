"""Steps in front of a quantized layer that end in its uint8 activations: RMSNorm and SiLU(gate) * up.

==============================  ============================================  ================
op                              inputs                                        outputs
==============================  ============================================  ================
``RMSNormQuantize``             X, weight, y_scale, y_zero_point              Y
``RMSNormDynamicQuantize``      X, weight                                     Y, scale
``SkipRMSNormQuantize``         X, skip, weight, y_scale, y_zero_point        Y, sum
``SkipRMSNormDynamicQuantize``  X, skip, weight                               Y, scale, sum
``SiluMulQuantize``             gate, up, y_scale, y_zero_point               Y
``SiluMulDynamicQuantize``      gate, up                                      Y, scale
==============================  ============================================  ================

X, skip, gate, up and sum are T [..., K] of one shape, T is float32, float16 or bfloat16; weight T [K]; y_scale float32
and y_zero_point uint8 [] or [1]; Y uint8 [..., K]; scale float32 [..., 1]. The norms have the attribute ``epsilon``.

- norm: ``v = T(X / sqrt(mean_k(X^2) + epsilon) * weight)``, of the Skip ops with ``sum = T(X + skip)`` in place of X;
- SiLU: ``v = T(gate / (1 + exp(-gate)) * up)``;
- static: ``Y = clip(round_half_even(v / y_scale) + y_zero_point, 0, 255)`` as QuantizeLinear;
- dynamic: ``Y, scale = DynamicQuantizePerToken(v)``.

What precedes ``T(...)`` is computed in float32. Kernels and :func:`rms_norm_reference` add the squares in float64, in
sixteen interleaved sums, so that these give the same bytes; function bodies add them as the runtime likes.
"""

from __future__ import annotations

__all__ = [
    "FUNCTIONS",
    "FusedResult",
    "StaticTarget",
    "quantize_reference",
    "rms_norm_quantize",
    "rms_norm_reference",
    "silu_mul_quantize",
    "silu_mul_reference",
]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.ops import dynamic_quantize_per_token
from fptq_onnx.ops.domain import DOMAIN, function_from_text

Array = npt.NDArray[np.generic]

_LANES = 16

_NORM = """
  epsilon_value = Constant <value_float: float = @epsilon> ()
  row = Constant <value_ints = [-1]> ()
  wide = Cast <to = 1> (normalized)
  square = Mul (wide, wide)
  mean = ReduceMean <keepdims = 1> (square, row)
  shifted_mean = Add (mean, epsilon_value)
  rms = Sqrt (shifted_mean)
  unit = Div (wide, rms)
  wide_weight = Cast <to = 1> (weight)
  product = Mul (unit, wide_weight)
"""
_SILU = """
  wide = Cast <to = 1> (gate)
  wide_up = Cast <to = 1> (up)
  sigmoid = Sigmoid (wide)
  silu = Mul (wide, sigmoid)
  product = Mul (silu, wide_up)
"""


@dataclass(frozen=True)
class StaticTarget:
    """Constants of static quantization as values of the graph: float32 scale and uint8 zero point, one element each."""

    scale: ir.Value
    zero_point: ir.Value


@dataclass(frozen=True)
class FusedResult:
    """Outputs of a reference.

    Attributes:
        y: uint8 [..., K].
        scale: float32 [..., 1], None for static quantization.
        sum: T [..., K] of the Skip ops, else None.
    """

    y: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32] | None
    sum: Array | None


def _name(stem: str, static: bool) -> str:
    return f"{stem}{'' if static else 'Dynamic'}Quantize"


def _function(stem: str, inputs: str, attributes: str, steps: str, sum_output: str, static: bool) -> ir.Function:
    """Join the pieces; `steps` leaves float32 `product`, and the first input has the type T."""
    targets = ", y_scale, y_zero_point" if static else ""
    outputs = "Y" if static else "Y, scale"
    quantize = "Y = QuantizeLinear (x, y_scale, y_zero_point)" if static else dynamic_quantize_per_token.body_steps()
    return function_from_text(
        f"""
{_name(stem, static)} {attributes} ({inputs}{targets}) => ({outputs}{sum_output})
{{
{steps}
  rounded_product = CastLike (product, {inputs.split(",", maxsplit=1)[0]})
  x = Cast <to = 1> (rounded_product)
  {quantize}
}}
"""
    )


# The sum, as all else, goes through float32: onnxruntime has no bfloat16 Add on the CPU.
_SUM = """
  wide_x = Cast <to = 1> (X)
  wide_skip = Cast <to = 1> (skip)
  wide_sum = Add (wide_x, wide_skip)
  sum = CastLike (wide_sum, X)
  normalized = Identity (sum)
"""

# Stem of the name -> inputs, attributes, steps, further output.
_PIECES = {
    "RMSNorm": ("X, weight", "<epsilon>", f"  normalized = Identity (X)\n{_NORM}", ""),
    "SkipRMSNorm": ("X, skip, weight", "<epsilon>", _SUM + _NORM, ", sum"),
    "SiluMul": ("gate, up", "", _SILU, ""),
}

FUNCTIONS: dict[str, Callable[[], ir.Function]] = {
    _name(stem, static): partial(_function, stem, *pieces, static)
    for stem, pieces in _PIECES.items()
    for static in (True, False)
}
"""Each op as a function of standard ONNX operators, for runtimes without the op library."""


def rms_norm_quantize(
    x: ir.Value,
    weight: ir.Value,
    target: StaticTarget | None,
    *,
    epsilon: float,
    skip: ir.Value | None = None,
    name: str | None = None,
) -> ir.Node:
    """Build one of the norm ops.

    Args:
        x: T [..., K].
        weight: T [K].
        target: Static quantization; None finds a scale per row.
        epsilon: Added to the mean square.
        skip: Added to ``x`` first; the sum is the last output.
        name: Name of the node.

    Returns:
        The node. Its first output is Y, then scale where ``target`` is None, then the sum where there is a ``skip``.
    """
    stem = "RMSNorm" if skip is None else "SkipRMSNorm"
    inputs = [x, weight] if skip is None else [x, skip, weight]
    return _node(stem, inputs, target, {"epsilon": float(epsilon)}, skip is not None, name)


def silu_mul_quantize(gate: ir.Value, up: ir.Value, target: StaticTarget | None, *, name: str | None = None) -> ir.Node:
    """Build one of the SiLU ops; outputs are Y and, where ``target`` is None, scale."""
    return _node("SiluMul", [gate, up], target, {}, False, name)


def _node(
    stem: str,
    inputs: list[ir.Value],
    target: StaticTarget | None,
    attributes: dict[str, float],
    has_sum: bool,
    name: str | None,
) -> ir.Node:
    x = inputs[0]
    inputs = inputs if target is None else [*inputs, target.scale, target.zero_point]
    count = 1 + (target is None) + has_sum
    node = ir.node(_name(stem, target is not None), inputs, attributes, domain=DOMAIN, name=name, num_outputs=count)
    y, *others = node.outputs
    y.type = ir.TensorType(ir.DataType.UINT8)
    y.shape = None if x.shape is None else x.shape.copy()
    if target is None:
        others[0].type = ir.TensorType(ir.DataType.FLOAT)
        others[0].shape = None if x.shape is None else ir.Shape([*x.shape[:-1], 1])
    if has_sum:
        others[-1].type = x.type
        others[-1].shape = None if x.shape is None else x.shape.copy()
    return node


def rms_norm_reference(
    x: Array,
    weight: Array,
    epsilon: float,
    *,
    skip: Array | None = None,
    static: tuple[float, int] | None = None,
) -> FusedResult:
    """Compute a norm op bit-exactly.

    Args:
        x: T [..., K].
        weight: T [K].
        epsilon: As the attribute, a float32.
        skip: T [..., K], added first.
        static: y_scale and y_zero_point, or None for a scale per row.
    """
    dtype = x.dtype
    total = x if skip is None else (x.astype(np.float32) + skip.astype(np.float32)).astype(dtype)
    wide = total.astype(np.float32)
    k = wide.shape[-1]
    padded = np.zeros((*wide.shape[:-1], -(-k // _LANES) * _LANES))
    padded[..., :k] = wide
    lanes = np.zeros((*wide.shape[:-1], _LANES))
    for start in range(0, k, _LANES):
        lanes += np.square(padded[..., start : start + _LANES])
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    with np.errstate(over="ignore", invalid="ignore"):
        rms = np.sqrt((lanes / k).astype(np.float32) + np.float32(epsilon))
        value = (wide / rms * weight.astype(np.float32)).astype(dtype)
    y, scale = quantize_reference(value, static)
    return FusedResult(y, scale, None if skip is None else total)


def silu_mul_reference(gate: Array, up: Array, *, static: tuple[float, int] | None = None) -> FusedResult:
    """Compute a SiLU op with the exact exponential: kernels differ by its rounding, so by a step at the borders."""
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        value = (wide / (1 + np.exp(-wide)) * up.astype(np.float64)).astype(np.float32).astype(gate.dtype)
    y, scale = quantize_reference(value, static)
    return FusedResult(y, scale, None)


def quantize_reference(
    value: Array, static: tuple[float, int] | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32] | None]:
    """Quantize statically (y_scale, y_zero_point) or, for None, per row; returns uint8 values and the row scales."""
    if static is None:
        return dynamic_quantize_per_token.reference(value)
    scale, zero_point = np.float32(static[0]), static[1]
    ratio = np.nan_to_num(value.astype(np.float32) / scale, nan=-zero_point, posinf=255, neginf=-255)
    return (np.clip(np.rint(ratio), -zero_point, 255 - zero_point) + zero_point).astype(np.uint8), None
