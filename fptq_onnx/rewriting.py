"""Turns the equalized float graph into the quantized one, in one of the output formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common

from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.fuse_attention import FuseAttentionPass
from fptq_onnx.passes.fuse_dynamic_matmul import FuseDynamicMatMulPass
from fptq_onnx.passes.fuse_quantize import FuseQuantizePass
from fptq_onnx.passes.inline_functions import InlineFunctionsPass
from fptq_onnx.passes.quantize_embedding import QuantizeEmbeddingPass, find_tied_heads
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
    embedding: Literal["float", "int8", "int4"] = "float",
    group_size: int | Literal["channel"] = 128,
    fuse: bool = False,
) -> str:
    """Replace the linear layers and, if asked to, the embedding table, in place.

    Args:
        model: The equalized float model.
        quantization: What was decided, by node name.
        output_format: See `convert`.
        embedding: How the table that token ids are looked up in is stored.
        group_size: Channels per scale of an int4 table that is not the head's.
        fuse: Put norms and SiLU into one op with the quantization behind them, other per-token quantizations into one
            with the product behind them, and float32 attention into ours.

    Returns:
        What became of the embedding table, for the report.
    """
    # A head that shares the table is known by its float weights, and found again by its name.
    heads = find_tied_heads(model) if embedding != "float" else {}
    PASSES[output_format](quantization)(model)
    if fuse:
        FuseQuantizePass()(model)
        FuseDynamicMatMulPass()(model)
        FuseAttentionPass()(model)
    AddFunctionsPass()(model)
    if output_format == "qdq":
        InlineFunctionsPass()(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    if embedding == "float":
        return "float"
    standard = output_format == "qdq"
    table = QuantizeEmbeddingPass(embedding, group_size=group_size, standard=standard, heads=heads)
    table(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    return table.outcome
