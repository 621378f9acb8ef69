"""Turns the equalized float graph into the quantized one, in one of the output formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common

from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.fuse_attention import FuseAttentionPass
from fptq_onnx.passes.fuse_quantize import FuseQuantizePass
from fptq_onnx.passes.inline_functions import InlineFunctionsPass
from fptq_onnx.passes.quantize_embedding import QuantizeEmbeddingPass
from fptq_onnx.passes.replace_linears import LayerQuantization, ReplaceLinearsPass
from fptq_onnx.passes.to_matmulnbits import ToMatMulNBitsPass
from fptq_onnx.passes.to_qdq import ToQdqPass
from fptq_onnx.passes.to_w4a8 import ToW4A8Pass

__all__ = ["PASSES", "Format", "rewrite"]

Format = Literal["custom", "matmulnbits", "qdq"]

PASSES: dict[Format, type[ReplaceLinearsPass]] = {
    "custom": ToW4A8Pass,
    "matmulnbits": ToMatMulNBitsPass,
    "qdq": ToQdqPass,
}


def rewrite(
    model: ir.Model,
    quantization: Mapping[str, LayerQuantization],
    output_format: Format,
    *,
    int8_embedding: bool,
    fuse: bool = False,
) -> str:
    """Replace the linear layers and, if asked to, the embedding table, in place.

    Args:
        model: The equalized float model.
        quantization: What was decided, by node name.
        output_format: See `convert`.
        int8_embedding: Quantize the table that token ids are looked up in.
        fuse: Put norms and SiLU into one op with the quantization behind them, and float32 attention into ours.

    Returns:
        What became of the embedding table, for the report.
    """
    PASSES[output_format](quantization)(model)
    if fuse:
        FuseQuantizePass()(model)
        FuseAttentionPass()(model)
    AddFunctionsPass()(model)
    if output_format == "qdq":
        InlineFunctionsPass()(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    if not int8_embedding:
        return "float"
    embedding = QuantizeEmbeddingPass()
    embedding(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    return embedding.outcome
