"""onnxruntime's GroupQueryAttention in float32 -> this package's, whose CPU kernel skips what is masked."""

from __future__ import annotations

import logging

import onnx_ir as ir

from fptq_onnx.ops.group_query_attention import RUNTIME_DOMAIN, RUNTIME_OP, group_query_attention
from fptq_onnx.passes.editing import take_over

__all__ = ["FuseAttentionPass"]

logger = logging.getLogger(__name__)

_OPERANDS, _CACHE, _ROTATION = slice(0, 3), slice(3, 7), slice(7, 9)
# Attributes and the values that mean the operator's plain form.
_PLAIN = {
    "local_window_size": -1,
    "softcap": 0.0,
    "smooth_softmax": 0,
    "qk_output": 0,
    "kv_cache_bit_width": 0,
    "k_quant_type": "NONE",
    "v_quant_type": "NONE",
}
_TAKEN = frozenset({"num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved"})


class FuseAttentionPass(ir.passes.InPlacePass):
    """Replace the nodes that the op covers; the others stay and the log says why.

    Only float32 nodes: onnxruntime has no CUDA kernel for these, so that a graph meant for CUDA (float16 or bfloat16)
    keeps the fast kernel that it has there.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != (RUNTIME_DOMAIN, RUNTIME_OP):
                continue
            reason = _obstacle(node)
            if reason is None:
                _replace(node)
                modified = True
            else:
                logger.info("%s: stays onnxruntime's %s: %s", node.name, RUNTIME_OP, reason)
        return ir.passes.PassResult(model, modified)


def _obstacle(node: ir.Node) -> str | None:
    """Return why the op cannot stand for a node, or None if it can."""
    operands, cache, rotation = (node.inputs[part] for part in (_OPERANDS, _CACHE, _ROTATION))
    dtypes = {value.dtype for value in (*operands, *cache[:2]) if value is not None}
    if dtypes != {ir.DataType.FLOAT}:
        return f"its type is {' and '.join(sorted(str(dtype) for dtype in dtypes))}, not FLOAT"
    if len(cache) < 4 or any(value is None for value in cache):
        return "it has no cache of keys and values"
    if [value is None for value in operands[1:]] not in ([True, True], [False, False]):
        return "it has a key without a value, or a value without a key"
    if any(value is not None for value in node.inputs[_ROTATION.stop :]):
        return "it has position ids, an attention bias, sinks or scales of a quantized cache"
    rotary = node.attributes.get_int("do_rotary", 0)
    if rotary and (len(rotation) < 2 or None in rotation):
        return "it rotates without tables of cosines and sines"
    if len(node.outputs) > 3 or any(output.name in (None, "") for output in node.outputs):
        return "it has other outputs than the result and the caches"
    for name, attribute in node.attributes.items():
        if name not in _TAKEN and (name not in _PLAIN or attribute.value != _PLAIN[name]):
            return f"its {name} is {attribute.value}"
    return None


def _replace(node: ir.Node) -> None:
    operands, cache, rotation = (
        [value for value in node.inputs[part] if value is not None] for part in (_OPERANDS, _CACHE, _ROTATION)
    )
    attributes = node.attributes
    fused = group_query_attention(
        operands,
        cache,
        rotation if attributes.get_int("do_rotary", 0) else (),
        num_heads=attributes.get_int("num_heads", 0),
        kv_num_heads=attributes.get_int("kv_num_heads", 0),
        scale=attributes.get_float("scale", 0.0),
        rotary_interleaved=bool(attributes.get_int("rotary_interleaved", 0)),
        name=node.name,
    )
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(node, fused)
    for old, new in zip(node.outputs, fused.outputs, strict=True):
        new.shape = new.shape if old.shape is None else old.shape
        take_over(new, old)
    graph.remove(node, safe=True)
