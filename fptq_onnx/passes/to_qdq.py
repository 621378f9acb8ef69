"""Linear layers -> the same arithmetic simulated in standard operators, for tools that know nothing else."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.passes.replace_linears import ActivationQuantizer, ReplaceLinearsPass, add_weight
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.int8 import Int8Weight

__all__ = ["ToQdqPass"]


class ToQdqPass(ReplaceLinearsPass):
    """MatMul(X, W) -> MatMul(dequantize(quantize(X)), DequantizeLinear(int4 W)).

    The activation is dequantized by Sub and Mul rather than DequantizeLinear: onnxruntime re-orders or fuses
    QuantizeLinear/DequantizeLinear pairs, and a per-token scale has no DequantizeLinear form.
    """

    def replace(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], QuantizedWeight]
    ) -> None:
        """Insert the round trip of the activation (once) and of the weight."""
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        activation = self.dequantized_activation(layer, quantizer)
        quantized = weight()
        integers, scale = add_weight(graph, layer.name, weight, quantized)
        dequantize = ir.node(
            "DequantizeLinear",
            [integers, scale],
            {"axis": 0, "block_size": quantized.block_size},
            name=f"{layer.name}.dequantize_weight",
        )
        dequantize.outputs[0].name = f"{layer.name}.weight"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = scale.type, integers.shape
        graph.insert_before(layer.node, [dequantize])
        self.finish(layer, ir.node("MatMul", [activation, dequantize.outputs[0]], name=layer.name))

    def replace_int8(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], Int8Weight]
    ) -> None:
        """Dequantize an int8 weight and multiply in float."""
        self.dequantized_matmul(layer, self.dequantized_activation(layer, quantizer), weight)
