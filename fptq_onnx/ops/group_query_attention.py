"""Causal attention over a cache of keys and values, in float32 on the CPU: com.microsoft.GroupQueryAttention's core.

=====================================  =========================================================
op                                     inputs
=====================================  =========================================================
``GroupQueryAttention``                query, key, value, *cache*
``RotaryGroupQueryAttention``          query, key, value, *cache*, cos_cache, sin_cache
``PackedGroupQueryAttention``          qkv, *cache*
``PackedRotaryGroupQueryAttention``    qkv, *cache*, cos_cache, sin_cache
=====================================  =========================================================

*cache* is past_key, past_value, seqlens_k, total_sequence_length; all give Y, present_key, present_value. Inputs,
outputs and the attributes ``num_heads``, ``kv_num_heads``, ``scale`` and, of the rotary ops, ``rotary_interleaved``
mean what they mean for onnxruntime's operator, which is the function body. There are four ops because custom ops have
no optional inputs. Shapes and the formula are in ``custom_ops/src/common/group_query_attention_schema.h``.

Kernels keep weights and sums in float32 and add them up in blocks of keys, so results differ from onnxruntime's by
rounding; they are the same bytes for any number of threads.
"""

from __future__ import annotations

__all__ = ["FUNCTIONS", "RUNTIME_DOMAIN", "RUNTIME_OP", "group_query_attention", "reference"]

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.ops.domain import DOMAIN, function_from_text

Array = npt.NDArray[np.float32]

RUNTIME_DOMAIN, RUNTIME_OP = "com.microsoft", "GroupQueryAttention"
"""onnxruntime's operator."""

_CACHE = "past_key, past_value, seqlens_k, total_sequence_length"


def _name(packed: bool, rotary: bool) -> str:
    return f"{'Packed' if packed else ''}{'Rotary' if rotary else ''}GroupQueryAttention"


def _function(packed: bool, rotary: bool) -> ir.Function:
    operands = "qkv" if packed else "query, key, value"
    rotation = ", cos_cache, sin_cache" if rotary else ""
    interleaved = ", rotary_interleaved" if rotary else ""
    return function_from_text(
        f"""
{_name(packed, rotary)} <num_heads, kv_num_heads, scale{interleaved}> ({operands}, {_CACHE}{rotation})
    => (Y, present_key, present_value)
{{
  Y, present_key, present_value = {RUNTIME_DOMAIN}.{RUNTIME_OP} <
      num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = {int(rotary)}
      {", rotary_interleaved: int = @rotary_interleaved" if rotary else ""}
    > ({"qkv, , " if packed else operands}, {_CACHE}{rotation})
}}
""",
        imports={RUNTIME_DOMAIN: 1},
    )


FUNCTIONS: dict[str, Callable[[], ir.Function]] = {
    _name(packed, rotary): partial(_function, packed, rotary) for packed in (False, True) for rotary in (False, True)
}
"""Each op as a function of onnxruntime's operator, for sessions without the op library."""


def group_query_attention(
    operands: Sequence[ir.Value],
    cache: Sequence[ir.Value],
    rotation: Sequence[ir.Value] = (),
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    rotary_interleaved: bool = False,
    name: str | None = None,
) -> ir.Node:
    """Build one of the ops.

    Args:
        operands: float32 qkv, or query, key and value.
        cache: past_key and past_value float32 [B, kv_num_heads, P, H], seqlens_k int32 [B], total_sequence_length int32
            of one element.
        rotation: cos_cache and sin_cache, float32 [positions, R]; none leaves queries and keys as they are.
        num_heads: Query heads.
        kv_num_heads: Key/value heads.
        scale: Of the scores; 0 is one over the square root of the head size.
        rotary_interleaved: Whether neighbours are rotated, and not halves.
        name: Name of the node.

    Returns:
        The node with the outputs Y, present_key and present_value.
    """
    attributes: dict[str, int | float] = {
        "num_heads": num_heads,
        "kv_num_heads": kv_num_heads,
        "scale": float(scale),
    }
    if rotation:
        attributes["rotary_interleaved"] = int(rotary_interleaved)
    op = _name(len(operands) == 1, bool(rotation))
    node = ir.node(op, [*operands, *cache, *rotation], attributes, domain=DOMAIN, name=name, num_outputs=3)
    y, *presents = node.outputs
    for output in node.outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    first, past = operands[0].shape, cache[0].shape
    if first is not None:
        side_by_side = num_heads + 2 * kv_num_heads if len(operands) == 1 else num_heads
        width = first[-1] // side_by_side * num_heads if isinstance(first[-1], int) else None
        y.shape = ir.Shape([*first[:-1], width])
    if past is not None:
        for present in presents:
            present.shape = ir.Shape([*past[:2], None, *past[3:]])
    return node


def reference(query: Array, key: Array, value: Array, *, scale: float) -> npt.NDArray[np.float64]:
    """Attend with one sequence's heads, already rotated, in float64.

    Args:
        query: [heads, S, H], the last S positions.
        key: [kv_heads, T, H].
        value: [kv_heads, T, H].
        scale: Of the scores, not 0.

    Returns:
        float64 [S, heads * H].
    """
    heads, rows, size = query.shape
    kv_heads, total, _ = key.shape
    wide = [np.repeat(array.astype(np.float64), heads // kv_heads, axis=0) for array in (key, value)]
    score = query.astype(np.float64) @ wide[0].transpose(0, 2, 1) * scale
    hidden = np.arange(total)[None, :] > np.arange(total - rows, total)[:, None]
    score[:, hidden] = -np.inf
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    result = weight / weight.sum(axis=-1, keepdims=True) @ wide[1]
    return np.asarray(result.transpose(1, 0, 2).reshape(rows, heads * size))
