"""Linear layers -> `fptq.W4A8MatMul` or `W8A8MatMul`, the integer ops of this package's custom-op library."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.ops import w4a8_matmul, w8a8_matmul
from fptq_onnx.passes.replace_linears import ActivationQuantizer, ReplaceLinearsPass, add_int8_weight, add_weight
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.int8 import Int8Weight

__all__ = ["ToW4A8Pass"]


class ToW4A8Pass(ReplaceLinearsPass):
    """MatMul(X, W) -> W4A8MatMul(QuantizeLinear(X) | DynamicQuantizePerToken(X), int4 W)."""

    def replace(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], QuantizedWeight]
    ) -> None:
        """Insert the quantize node (once per activation) and the integer MatMul."""
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        activation = self.quantized_activation(layer, quantizer)
        quantized = weight()
        integers, scale = add_weight(graph, layer.name, weight, quantized)
        matmul = w4a8_matmul.w4a8_matmul(
            activation.data,
            activation.scale,
            activation.zero_point,
            integers,
            scale,
            block_size=quantized.block_size,
            scale_max_multiple=quantized.scale_max_multiple,
            name=layer.name,
        )
        self.finish(layer, matmul)

    def replace_int8(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], Int8Weight]
    ) -> None:
        """The same with an int8 weight."""
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        activation = self.quantized_activation(layer, quantizer)
        integers, scale = add_int8_weight(graph, layer.name, weight, weight())
        matmul = w8a8_matmul.w8a8_matmul(
            activation.data, activation.scale, activation.zero_point, integers, scale, name=layer.name
        )
        self.finish(layer, matmul)
