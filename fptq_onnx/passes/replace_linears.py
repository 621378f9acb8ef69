"""The shared part of the passes that replace linear layers by quantized ones; each output format is a subclass."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast as typing_cast

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.ops import dynamic_quantize_per_token
from fptq_onnx.passes.editing import add_constant, add_int4_constant, add_lazy_constant, as_numpy, cast, replace_node
from fptq_onnx.passes.weights import shift_bias
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.int8 import Int8Weight

__all__ = [
    "ActivationQuantizer",
    "LayerQuantization",
    "PerTokenQuantizer",
    "QuantizedActivation",
    "ReplaceLinearsPass",
    "StaticQuantizer",
    "add_int8_weight",
    "add_weight",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StaticQuantizer:
    """Per-tensor constants: q = clip(round(x / scale) + zero_point, 0, 255)."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class PerTokenQuantizer:
    """A scale per token, found at run time: q = round(x / scale) + 128 with scale = max |x| / 127."""


ActivationQuantizer = StaticQuantizer | PerTokenQuantizer


@dataclass(frozen=True)
class LayerQuantization:
    """What was decided for one linear layer.

    Attributes:
        activation: How its input is quantized.
        weight: Gives its int4 or int8 weight, the same each time: when the pass reaches it, and when the constant is
            read, so that the weights of a large model need not be in memory. None leaves the weight float
            ("activations only").
        bias_shift: float32 [N] to add to the layer's bias, if it has one.
    """

    activation: ActivationQuantizer
    weight: Callable[[], QuantizedWeight | Int8Weight] | None
    bias_shift: np.ndarray | None = None


@dataclass(frozen=True)
class QuantizedActivation:
    """The values a quantize node leaves in the graph: uint8 data, float32 scale, uint8 zero point."""

    data: ir.Value
    scale: ir.Value
    zero_point: ir.Value


class ReplaceLinearsPass(ir.passes.InPlacePass, abc.ABC):
    """Replace every linear layer that has a decision; layers that share an activation share its quantize node.

    Args:
        decisions: Node name of a linear layer -> its quantization. Layers without one are left alone.
    """

    def __init__(self, decisions: Mapping[str, LayerQuantization]) -> None:
        """Keep the decisions; nothing is computed before the pass runs."""
        self._decisions = decisions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        self._quantized: dict[ActivationQuantizer, QuantizedActivation] = {}
        self._dequantized: dict[ActivationQuantizer, ir.Value] = {}
        modified = False
        for group in group_by_activation(find_linears(model).layers):
            self._quantized.clear()
            self._dequantized.clear()
            for layer in group.layers:
                decision = self._decisions.get(layer.name)
                if decision is None:
                    continue
                if decision.weight is None:
                    layer.node.replace_input_with(0, self.dequantized_activation(layer, decision.activation))
                else:
                    if decision.bias_shift is not None:
                        shift_bias(_graph_of(layer), layer, decision.bias_shift)
                    quantized = decision.weight()
                    if isinstance(quantized, Int8Weight):
                        self.replace_int8(
                            layer, decision.activation, typing_cast(Callable[[], Int8Weight], decision.weight)
                        )
                    else:
                        self.replace(
                            layer, decision.activation, typing_cast(Callable[[], QuantizedWeight], decision.weight)
                        )
                modified = True
        return ir.passes.PassResult(model, modified)

    @abc.abstractmethod
    def replace(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], QuantizedWeight]
    ) -> None:
        """Replace `layer` by its quantized form."""

    @abc.abstractmethod
    def replace_int8(
        self, layer: LinearLayer, quantizer: ActivationQuantizer, weight: Callable[[], Int8Weight]
    ) -> None:
        """Replace `layer` by its form with an int8 weight."""

    def dequantized_matmul(self, layer: LinearLayer, activation: ir.Value, weight: Callable[[], Int8Weight]) -> None:
        """MatMul(X, W) -> MatMul(activation, DequantizeLinear(int8 W)), a scale per column."""
        graph = _graph_of(layer)
        integers, scale = add_int8_weight(graph, layer.name, weight, weight())
        name = f"{layer.name}.dequantize_weight"
        dequantize = ir.node("DequantizeLinear", [integers, scale], {"axis": 1}, name=name)
        dequantize.outputs[0].name = f"{layer.name}.weight"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = scale.type, integers.shape
        graph.insert_before(layer.node, [dequantize])
        self.finish(layer, ir.node("MatMul", [activation, dequantize.outputs[0]], name=layer.name))

    def quantized_activation(self, layer: LinearLayer, quantizer: ActivationQuantizer) -> QuantizedActivation:
        """Return the quantized input of `layer`, inserting its quantize node in front of the first reader."""
        if quantizer not in self._quantized:
            if isinstance(quantizer, StaticQuantizer):
                self._quantized[quantizer] = _insert_static(layer, quantizer)
            else:
                self._quantized[quantizer] = _insert_per_token(layer)
        return self._quantized[quantizer]

    def dequantized_activation(self, layer: LinearLayer, quantizer: ActivationQuantizer) -> ir.Value:
        """Return the input of `layer` rounded to uint8 and back, in the layer's own float type."""
        if quantizer not in self._dequantized:
            quantized = self.quantized_activation(layer, quantizer)
            self._dequantized[quantizer] = _insert_dequantize(layer, quantized)
        return self._dequantized[quantizer]

    def finish(self, layer: LinearLayer, matmul: ir.Node) -> None:
        """Put `matmul` in the place of the layer's node; a Gemm's bias becomes an Add (ops take no optional inputs)."""
        if layer.bias is None or layer.bias_node is not None:
            replace_node(layer.node, [matmul])
            return
        bias = layer.bias_array()
        assert bias is not None
        product, output = matmul.outputs[0], layer.node.outputs[0]
        product.name, product.type, product.shape = f"{output.name}.product", output.type, output.shape
        stored = add_constant(_graph_of(layer), f"{layer.name}.bias", bias.astype(_float_type(layer).numpy()))
        replace_node(layer.node, [matmul, ir.node("Add", [product, stored], name=f"{layer.name}.add_bias")])


def add_weight(
    graph: ir.Graph, name: str, weight: Callable[[], QuantizedWeight], described: QuantizedWeight
) -> tuple[ir.Value, ir.Value]:
    """Add a layer's int4 weight and its scales as constants that are read from `weight` when they are needed.

    Args:
        graph: Where to.
        name: Of the layer.
        weight: See `LayerQuantization`.
        described: What it gives; its shapes and type are kept, not its data.
    """
    scale = described.scale
    return (
        add_int4_constant(graph, f"{name}.weight_int4", described.q.shape, lambda: weight().q),
        add_lazy_constant(
            graph, f"{name}.weight_scale", ir.DataType.from_numpy(scale.dtype), scale.shape, lambda: weight().scale
        ),
    )


def add_int8_weight(
    graph: ir.Graph, name: str, weight: Callable[[], Int8Weight], described: Int8Weight
) -> tuple[ir.Value, ir.Value]:
    """The same for an int8 weight."""
    scale = described.scale
    return (
        add_lazy_constant(graph, f"{name}.weight_int8", ir.DataType.INT8, described.q.shape, lambda: weight().q),
        add_lazy_constant(
            graph, f"{name}.weight_scale", ir.DataType.from_numpy(scale.dtype), scale.shape, lambda: weight().scale
        ),
    )


def _graph_of(layer: LinearLayer) -> ir.Graph:
    graph = layer.node.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"layer {layer.name} is in no graph")
    return graph


def _float_type(layer: LinearLayer) -> ir.DataType:
    dtype = layer.activation.dtype or layer.weight.dtype
    if dtype is None:
        raise ValueError(f"activation of {layer.name} has no type")
    return dtype


def _insert_static(layer: LinearLayer, quantizer: StaticQuantizer) -> QuantizedActivation:
    graph, name, source = _graph_of(layer), layer.activation.name, layer.activation
    dtype = _float_type(layer)
    nodes: list[ir.Node] = []
    if dtype == ir.DataType.BFLOAT16:
        # onnxruntime has no QuantizeLinear kernel for bfloat16.
        nodes.append(cast(source, ir.DataType.FLOAT, f"{name}.float"))
        source, dtype = nodes[-1].outputs[0], ir.DataType.FLOAT
    zero_point = add_constant(graph, f"{name}.zero_point", as_numpy(ir.DataType.UINT8, quantizer.zero_point))
    scale = add_constant(graph, f"{name}.scale", as_numpy(dtype, quantizer.scale))
    kernel_scale = scale
    if dtype != ir.DataType.FLOAT:
        stored = float(as_numpy(dtype, quantizer.scale))
        kernel_scale = add_constant(graph, f"{name}.scale_float", as_numpy(ir.DataType.FLOAT, stored))
    quantize = ir.node("QuantizeLinear", [source, scale, zero_point], name=f"{name}.quantize")
    data = quantize.outputs[0]
    data.name, data.type, data.shape = f"{name}.uint8", ir.TensorType(ir.DataType.UINT8), layer.activation.shape
    graph.insert_before(layer.node, [*nodes, quantize])
    return QuantizedActivation(data, kernel_scale, zero_point)


def _insert_per_token(layer: LinearLayer) -> QuantizedActivation:
    graph, name = _graph_of(layer), layer.activation.name
    zero_point = add_constant(graph, f"{name}.zero_point", np.array(dynamic_quantize_per_token.ZERO_POINT, np.uint8))
    node = dynamic_quantize_per_token.dynamic_quantize_per_token(layer.activation, name=f"{name}.quantize")
    data, scale = node.outputs
    data.name, scale.name = f"{name}.uint8", f"{name}.scale"
    graph.insert_before(layer.node, [node])
    return QuantizedActivation(data, scale, zero_point)


def _insert_dequantize(layer: LinearLayer, quantized: QuantizedActivation) -> ir.Value:
    """Compute (q - zero_point) * scale in float32 and cast it to the layer's type; scale may be [..., 1]."""
    graph, name = _graph_of(layer), layer.activation.name
    integers = cast(quantized.data, ir.DataType.FLOAT, f"{name}.integers")
    zero = cast(quantized.zero_point, ir.DataType.FLOAT, f"{name}.zero")
    centred = ir.node("Sub", [integers.outputs[0], zero.outputs[0]], name=f"{name}.centred")
    scaled = ir.node("Mul", [centred.outputs[0], quantized.scale], name=f"{name}.dequantize")
    restored = cast(scaled.outputs[0], _float_type(layer), f"{name}.restored")
    for node in (centred, scaled):
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), layer.activation.shape
    graph.insert_before(layer.node, [integers, zero, centred, scaled, restored])
    return restored.outputs[0]
