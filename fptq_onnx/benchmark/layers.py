"""Turns times of nodes into times of linear layers and operators, and names the kernels that ran."""

from __future__ import annotations

__all__ = ["LayerIndex", "index_layers", "phase_profile"]

import contextlib
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from fptq_onnx.benchmark.profile import NodeTime, PhaseTimes
from fptq_onnx.benchmark.results import LayerTime, OpTime, PhaseProfile
from fptq_onnx.errors import RuntimeUnavailableError
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.ops import DOMAIN, dynamic_quantize_w4a8_matmul, w4a8_matmul, w8a8_matmul
from fptq_onnx.ops.inspection import Product, kernel_name
from fptq_onnx.runtime import Provider

_LEVELS = {"MatMulNBits": "accuracy_level"}
# This package's products, with int4 weights and with others.
_INT4_PRODUCTS = (w4a8_matmul.NAME, dynamic_quantize_w4a8_matmul.NAME)
_PRODUCTS = (*_INT4_PRODUCTS, w8a8_matmul.NAME)
_CUDA = "CUDAExecutionProvider"


@dataclasses.dataclass(frozen=True)
class LayerIndex:
    """What the graph and the report beside it say about nodes.

    Attributes:
        labels: Node name -> label of the linear layer.
        products: Node name -> its product at 0 rows, of this package's integer ops.
        levels: Node name -> accuracy level, of MatMulNBits.
    """

    labels: Mapping[str, str]
    products: Mapping[str, Product]
    levels: Mapping[str, int]


def index_layers(model: ir.Model, path: Path) -> LayerIndex:
    """Read the linear layers of a model, float or quantized.

    Args:
        model: The model.
        path: Its file; the report that `convert` writes beside it gives the labels of quantized layers.
    """
    labels = {layer.name: layer.label for layer in find_linears(model).layers}
    # No report, or another program's: then the labels come from the models compared with.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        labels |= {str(layer["name"]): str(layer["label"]) for layer in report["layers"]}
    products, levels = {}, {}
    for node in model.graph:
        name = node.name or ""
        if node.domain == DOMAIN and node.op_type in _PRODUCTS:
            product = _product(node)
            if product is not None:
                products[name] = product
        if node.op_type in _LEVELS:
            levels[name] = node.attributes.get_int(_LEVELS[node.op_type], 0)
    return LayerIndex(labels, products, levels)


def phase_profile(
    phase: PhaseTimes, index: LayerIndex, other_labels: Mapping[str, str], provider: Provider
) -> PhaseProfile:
    """Group the nodes of one phase.

    Args:
        phase: From the profile.
        index: Of the model.
        other_labels: Labels of the models compared with, for nodes that this one does not label.
        provider: Where the model was asked to run; tells which kernel was chosen.
    """
    total = sum(node.microseconds for node in phase.nodes)
    groups: dict[tuple[str, str], list[NodeTime]] = defaultdict(list)
    layers = []
    labels = {**other_labels, **index.labels}
    for node in phase.nodes:
        groups[node.op, node.provider].append(node)
        origin = _origin(node.name, labels)
        if origin is not None and node.rows:
            kernel = _kernel(node, origin, index, provider)
            layers.append(
                LayerTime(
                    labels[origin],
                    node.name,
                    node.op,
                    node.provider,
                    kernel,
                    node.rows,
                    node.microseconds,
                    node.microseconds / total if total else 0.0,
                )
            )
    ops = [
        OpTime(op, where, len(nodes), time, time / total if total else 0.0)
        for (op, where), nodes in groups.items()
        for time in [sum(node.microseconds for node in nodes)]
    ]
    ops.sort(key=lambda op: -op.microseconds)
    return PhaseProfile(phase.run_microseconds, total, tuple(ops), tuple(layers))


def _origin(name: str, labels: Mapping[str, str]) -> str | None:
    """The layer a node came from: onnxruntime names a fused node after it, as in "fc1/MatMulScaleFusion"."""
    while name:
        if name in labels:
            return name
        name = name.rpartition("/")[0]
    return None


def _kernel(node: NodeTime, origin: str, index: LayerIndex, provider: Provider) -> str | None:
    if node.op in _LEVELS and origin in index.levels:
        return f"accuracy level {index.levels[origin]}"
    product = index.products.get(origin)
    if product is None or node.op not in _PRODUCTS:
        return None
    on_cuda = node.provider == _CUDA and provider == "cuda"
    if on_cuda and node.op not in _INT4_PRODUCTS:
        return None
    try:
        return kernel_name(dataclasses.replace(product, rows=node.rows), 0 if on_cuda else None)
    except RuntimeUnavailableError:
        return None


def _product(node: ir.Node) -> Product | None:
    weight, scale = node.inputs[-2:]
    if weight is None or weight.shape is None or scale is None or scale.dtype is None:
        return None
    k, n = weight.shape.numpy()
    return Product(
        0,
        k,
        n,
        node.attributes.get_int("block_size", k),
        node.attributes.get_int("scale_max_multiple", 0) > 0,
        int(scale.dtype.itemsize),
        node.op_type == dynamic_quantize_w4a8_matmul.NAME,
    )
