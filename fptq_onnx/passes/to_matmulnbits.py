"""Linear layers -> onnxruntime's own `com.microsoft.MatMulNBits`: int4 weights, float activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fptq_onnx.errors import RecipeError
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.passes.editing import add_lazy_constant
from fptq_onnx.passes.replace_linears import ActivationQuantizer, ReplaceLinearsPass
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.int8 import Int8Weight

__all__ = ["ToMatMulNBitsPass"]

MICROSOFT = "com.microsoft"
SMALLEST_BLOCK = 16
# The level at which onnxruntime's CPU kernel computes in int8; other providers ignore it.
ACCURACY_LEVEL_INT8 = 4


class ToMatMulNBitsPass(ReplaceLinearsPass):
    """MatMul(X, W) -> MatMulNBits(X, int4 W), for execution providers that this package has no kernel for."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run, then import the operator's domain."""
        result = super().call(model)
        if result.modified:
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return result

    def replace(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], QuantizedWeight]
    ) -> None:
        """Re-pack the integers as unsigned nibbles [N, K/block, block/2] with zero point 8; scales keep their sign.

        Raises:
            RecipeError: The block size is not a power of two of at least 16, which the operator demands.
        """
        quantized = weight()
        k, n = quantized.q.shape
        # One group over all of K has the same values in any larger block.
        several = quantized.scale.shape[0] > 1
        block = quantized.block_size if several else max(SMALLEST_BLOCK, 1 << (k - 1).bit_length())
        if block < SMALLEST_BLOCK or block & (block - 1):
            raise RecipeError(
                f"layer {layer.name}",
                f"MatMulNBits needs a block size that is a power of two >= {SMALLEST_BLOCK}, not {block}",
                "Set weights.group_size to 32, 64 or 128 or use --format custom",
            )
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        shape = (n, -(-k // block), block // 2)
        integers = add_lazy_constant(
            graph, f"{layer.name}.weight_nbits", ir.DataType.UINT8, shape, lambda: _packed(weight().q, block)
        )
        scale = add_lazy_constant(
            graph,
            f"{layer.name}.weight_scale",
            ir.DataType.from_numpy(quantized.scale.dtype),
            (quantized.scale.size,),
            lambda: weight().scale.T.reshape(-1),
        )
        attributes = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": ACCURACY_LEVEL_INT8}
        matmul = ir.node(
            "MatMulNBits", [layer.activation, integers, scale], attributes, domain=MICROSOFT, name=layer.name
        )
        self.finish(layer, matmul)

    def replace_int8(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], Int8Weight]
    ) -> None:
        """Dequantize an int8 weight and multiply in float: the operator holds int4 only."""
        self.dequantized_matmul(layer, layer.activation, weight)


def _packed(q: np.ndarray, block: int) -> np.ndarray:
    """Integers int8 [K, N] as unsigned nibbles, uint8 [N, K / block, block / 2]; the last block is filled up."""
    k, n = q.shape
    blocks = -(-k // block)
    unsigned = np.full((n, blocks * block), 8, dtype=np.uint8)
    unsigned[:, :k] = (q.T + 8).astype(np.uint8)
    packed: np.ndarray = (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).reshape(n, blocks, block // 2)
    return packed
