"""DynamicQuantizePerToken whose only reader is one W4A8MatMul -> one op on float activations."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.constants import constant_array
from fptq_onnx.ops import DOMAIN, dynamic_quantize_per_token, w4a8_matmul
from fptq_onnx.ops.dynamic_quantize_w4a8_matmul import dynamic_quantize_w4a8_matmul
from fptq_onnx.passes.editing import replace_node

__all__ = ["FuseDynamicMatMulPass"]

logger = logging.getLogger(__name__)


class FuseDynamicMatMulPass(ir.passes.InPlacePass):
    """Fuse where nothing else reads the quantized activation; the results keep their bytes.

    An activation that several products read is quantized once, so it stays a node of its own, and the log says so.
    Runs after `FuseQuantizePass`: a step in front of the quantization, such as a norm, is the better partner.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != (DOMAIN, w4a8_matmul.NAME):
                continue
            quantize = _quantize_node(node)
            if quantize is None:
                continue
            reason = _obstacle(quantize, node)
            if reason is None:
                _replace(quantize, node)
                modified = True
            else:
                logger.info("%s: not fused with the quantization of its activation: %s", node.name, reason)
        return ir.passes.PassResult(model, modified)


def _quantize_node(matmul: ir.Node) -> ir.Node | None:
    """Return the DynamicQuantizePerToken that gives a product its activation."""
    activation = matmul.inputs[0]
    producer = None if activation is None else activation.producer()
    if producer is None or (producer.domain, producer.op_type) != (DOMAIN, dynamic_quantize_per_token.NAME):
        return None
    return producer


def _obstacle(quantize: ir.Node, matmul: ir.Node) -> str | None:
    """Return why the two must stay two nodes, or None if they need not."""
    x, b_scale = quantize.inputs[0], matmul.inputs[4]
    if any(output.is_graph_output() for output in quantize.outputs):
        return "its uint8 values or scales are outputs of the model"
    readers = [use for output in quantize.outputs for use in output.uses()]
    if [(use.node, use.idx) for use in readers] != [(matmul, 0), (matmul, 1)]:
        return "other nodes read the quantized activation or its scale"
    zero_point = constant_array(matmul.inputs[2])
    if zero_point is None or not np.array_equal(zero_point.reshape(-1), [dynamic_quantize_per_token.ZERO_POINT]):
        return f"its zero point is not the constant {dynamic_quantize_per_token.ZERO_POINT}"
    if x is None or b_scale is None or x.dtype is None or x.dtype != b_scale.dtype:
        return "the activation is not known to have the type of the result"
    return None


def _replace(quantize: ir.Node, matmul: ir.Node) -> None:
    x, b, b_scale = quantize.inputs[0], matmul.inputs[3], matmul.inputs[4]
    assert x is not None and b is not None and b_scale is not None
    fused = dynamic_quantize_w4a8_matmul(
        x,
        b,
        b_scale,
        block_size=matmul.attributes.get_int("block_size", 0),
        scale_max_multiple=matmul.attributes.get_int("scale_max_multiple", 0),
        name=matmul.name,
    )
    replace_node(matmul, [fused])
    assert isinstance(quantize.graph, ir.Graph)
    quantize.graph.remove(quantize, safe=True)
