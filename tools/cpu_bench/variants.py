"""One float decoder in the forms that are compared for speed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
from baselines import quantize_matmulnbits
from onnxruntime.quantization import QuantType, quantize_dynamic

from fptq_onnx import ops
from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.graph.model_file import load_model, save_model, source_files
from fptq_onnx.graph.roles import Role
from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.editing import add_constant, replace_node
from fptq_onnx.passes.fuse_attention import FuseAttentionPass
from fptq_onnx.passes.fuse_dynamic_matmul import FuseDynamicMatMulPass
from fptq_onnx.passes.fuse_quantize import FuseQuantizePass
from fptq_onnx.passes.replace_linears import LayerQuantization, PerTokenQuantizer, StaticQuantizer
from fptq_onnx.passes.to_w4a8 import ToW4A8Pass
from fptq_onnx.quantization.int4 import MAX_MULTIPLE, quantize_weight
from fptq_onnx.storage.fingerprint import file_fingerprint

__all__ = ["VARIANTS", "write_variant"]

# As the recipe "balanced" decides on SmolLM2: inputs of down_proj per token, most others static.
STATIC, PER_TOKEN = StaticQuantizer(1 / 16, 128), PerTokenQuantizer()


def write_variant(name: str, source: Path, folder: Path) -> Path:
    """Return the model of one name in `VARIANTS`, made from `source` unless `folder` holds just that already.

    Weights are rounded to nearest and static scales are made up: nothing but the time of such a model means anything.
    """
    if name == "float32":
        return source
    target = folder / name.replace(" ", "-") / "model.onnx"
    made_of = target.with_name("source.sha256")  # written last: what an interrupted run left is made again
    wanted = file_fingerprint(source, source_files(load_model(source)))
    if not made_of.is_file() or made_of.read_text(encoding="utf-8") != wanted:
        target.parent.mkdir(parents=True, exist_ok=True)
        made_of.unlink(missing_ok=True)
        VARIANTS[name](source, target)
        made_of.write_text(wanted, encoding="utf-8")
    return target


def _matmul_nbits(source: Path, target: Path) -> None:
    quantize_matmulnbits(source, target, 128)


def _dynamic_int8(source: Path, target: Path) -> None:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            source, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], use_external_data_format=True
        )
    finally:
        logging.disable(previous)


def _w4a8(
    source: Path, target: Path, *, max_multiple: int, int8_head: bool, fused: bool, attention: bool = True
) -> None:
    model = load_model(source)

    def quantization(layer: LinearLayer) -> LayerQuantization:
        weight = quantize_weight(
            layer.weight_array(), min(128, layer.k), "signed8", np.float32, max_multiple=max_multiple
        )
        return LayerQuantization(PER_TOKEN if layer.role is Role.DOWN else STATIC, lambda: weight)

    layers = find_linears(model).layers
    ToW4A8Pass({layer.name: quantization(layer) for layer in layers if layer.role is not Role.LM_HEAD})(model)
    for layer in find_linears(model).layers if int8_head else []:
        if layer.role is Role.LM_HEAD:
            _int8_head(model.graph, layer)
    if fused:
        FuseQuantizePass()(model)
        FuseDynamicMatMulPass()(model)
        if attention:
            FuseAttentionPass()(model)
    AddFunctionsPass()(model)
    save_model(model, target)


def _int8_head(graph: ir.Graph, layer: LinearLayer) -> None:
    weight = layer.weight_array()
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    quantize = ops.dynamic_quantize_per_token.dynamic_quantize_per_token(layer.activation, name="head.quantize")
    quantize.outputs[0].name, quantize.outputs[1].name = "head.uint8", "head.scale"
    graph.insert_before(layer.node, [quantize])
    matmul = ops.w8a8_matmul.w8a8_matmul(
        *quantize.outputs,
        add_constant(graph, "head.zero_point", np.array(128, np.uint8)),
        add_constant(graph, "head.weight_int8", np.rint(weight / scale).astype(np.int8)),
        add_constant(graph, "head.weight_scale", scale),
        name=layer.name,
    )
    replace_node(layer.node, [matmul])


VARIANTS = {
    "float32": None,
    "MatMulNBits b128": _matmul_nbits,
    "dynamic int8": _dynamic_int8,
    "W4A8": lambda source, target: _w4a8(source, target, max_multiple=MAX_MULTIPLE, int8_head=True, fused=True),
    "W4A8 float scales": lambda source, target: _w4a8(source, target, max_multiple=0, int8_head=True, fused=True),
    "W4A8 unfused": lambda source, target: _w4a8(
        source, target, max_multiple=MAX_MULTIPLE, int8_head=True, fused=False
    ),
    "W4A8 onnxruntime attention": lambda source, target: _w4a8(
        source, target, max_multiple=MAX_MULTIPLE, int8_head=True, fused=True, attention=False
    ),
    "W4A8 float head": lambda source, target: _w4a8(
        source, target, max_multiple=MAX_MULTIPLE, int8_head=False, fused=True
    ),
}
"""Name -> writer. "W4A8": integer-structured scales, int8 head, fused steps; the others each lack one of these.

Fused steps are those of `convert --fuse`, attention among them.
"""
