"""Small ONNX models for benchmarks and GPU tests: chains of linear layers in each format a runtime can execute."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper

from fptq_onnx import ops
from fptq_onnx.ops import DOMAIN
from gpu_bench.problem import SCALE_MAX_MULTIPLE, ZERO_POINT, Shape, Weight, pack_int4, random_weight
from gpu_bench.sessions import ELEMENT_TYPES

__all__ = [
    "Activation",
    "Format",
    "ModelBuilder",
    "layer_model",
    "linear",
    "static_scale",
    "store",
    "w4a8_layer",
    "write_chain",
]


class Format(enum.StrEnum):
    """How a layer's weight is stored and multiplied."""

    FLOAT16 = "fp16 MatMul"
    NBITS_128 = "MatMulNBits b128"
    NBITS_32 = "MatMulNBits b32"
    W4A8 = "W4A8 b128"
    W4A8_STRUCTURED = "W4A8 b128 structured"
    W4A8_ONE_OP = "W4A8 b128, quantization in the product's op"
    W4A8_STRUCTURED_ONE_OP = "W4A8 b128 structured, quantization in the product's op"
    W4A8_STATIC = "W4A8 b128 static"
    W4A8_FUSED = "W4A8 b128 structured, norms and SiLU that quantize"  # of whole decoders

    @property
    def structured(self) -> bool:
        """Whether scales are small multiples of one base per column."""
        return self in (Format.W4A8_STRUCTURED, Format.W4A8_STRUCTURED_ONE_OP, Format.W4A8_FUSED)

    @property
    def one_op(self) -> bool:
        """Whether activations that are float at a layer are quantized by its op, as `convert --fuse` has it."""
        return self in (Format.W4A8_ONE_OP, Format.W4A8_STRUCTURED_ONE_OP, Format.W4A8_FUSED)

    @property
    def block(self) -> int:
        """Input channels per scale of the 4-bit formats."""
        return 32 if self is Format.NBITS_32 else 128

    @property
    def weight_bytes_per_element(self) -> float:
        """Without scales."""
        return 2.0 if self is Format.FLOAT16 else 0.5


class Activation(enum.StrEnum):
    """How a layer's activation reaches W4A8MatMul."""

    PER_TOKEN = "per-token"  # DynamicQuantizePerToken in the graph
    STATIC = "static"  # QuantizeLinear in the graph
    QUANTIZED = "quantized"  # A and a_scale are graph inputs


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model with the operators' function bodies, as the converter writes them."""
    opsets = {"": ops.BODY_OPSET, DOMAIN: ops.VERSION, "com.microsoft": 1}
    modules = (ops.w4a8_matmul, ops.dynamic_quantize_per_token, ops.dynamic_quantize_w4a8_matmul)
    functions = [module.function() for module in modules]
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        functions=[ir.serde.serialize_function(function) for function in functions],
        ir_version=10,
    )


@dataclass
class ModelBuilder:
    """Collects nodes and initializers; large initializers go to one external file as they come.

    Attributes:
        path: Where the model goes; the weights go to the same name with ".data" appended.
    """

    path: Path
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin an empty data file."""
        self.data_path = self.path.with_name(self.path.name + ".data")
        self.data_path.write_bytes(b"")

    def external(self, name: str, element_type: int, dims: Sequence[int], data: torch.Tensor) -> str:
        """Append `data`'s bytes to the external file as initializer `name`; returns the name."""
        raw = data.cpu().reshape(-1).view(torch.uint8).numpy()
        with self.data_path.open("ab") as file:
            file.write(bytes(-file.tell() % 4096))
            offset = file.tell()
            raw.tofile(file)
        tensor = TensorProto(name=name, data_type=element_type, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.data_path.name, "offset": offset, "length": raw.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def alias(self, name: str, original: str) -> str:
        """A further initializer that reads the same bytes of the external file; returns its name."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(next(known for known in self.initializers if known.name == original))
        tensor.name = name
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a small initializer once; returns the name."""
        if name not in self._names:
            self._names.add(name)
            self.initializers.append(onnx.numpy_helper.from_array(value, name))
        return name

    def node(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: object
    ) -> None:
        """Append a node named after its first output."""
        self._names.update(outputs)
        self.nodes.append(
            helper.make_node(op_type, inputs, outputs, name=f"{outputs[0]}/{op_type}", domain=domain, **attributes)
        )

    def makes(self, name: str) -> bool:
        """Whether there is a node or constant of this name already."""
        return name in self._names

    def node_once(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "") -> None:
        """Append a node unless one already makes its first output."""
        if outputs[0] not in self._names:
            self._names.add(outputs[0])
            self.node(op_type, inputs, outputs, domain)

    def save(
        self, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto], name: str = "chain"
    ) -> Path:
        """Write the model."""
        graph = helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.initializers)
        onnx.save(_model(graph), self.path)
        return self.path


def w4a8_layer(
    builder: ModelBuilder,
    quantized: str,
    a_scale: str,
    weight: Sequence[str],
    output: str,
    block: int,
    scale_max_multiple: int = 0,
) -> None:
    """Append fptq.W4A8MatMul on a quantized activation with zero point 128.

    Args:
        builder: The model.
        quantized: uint8 activation.
        a_scale: Its scale.
        weight: Names of B and b_scale.
        output: Name of Y.
        block: Input channels per scale.
        scale_max_multiple: See the operator.
    """
    zero_point = builder.constant("zero_point_128", np.array(ZERO_POINT, np.uint8))
    builder.node(
        "W4A8MatMul",
        [quantized, a_scale, zero_point, *weight],
        [output],
        DOMAIN,
        block_size=block,
        scale_max_multiple=scale_max_multiple,
    )


def _nbits(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """MatMulNBits' layout: B uint8 [N, K / block, block / 2] with zero point 8, scales [N, K / block]."""
    padding = weight.scale.shape[0] * weight.block - weight.values.shape[0]
    offset = torch.nn.functional.pad(weight.values, (0, 0, 0, padding)).add(8).to(torch.uint8).t().contiguous()
    packed = offset[:, 0::2] | (offset[:, 1::2] << 4)
    return packed, weight.scale.t().contiguous()


def store(builder: ModelBuilder, name: str, shape: Shape, form: Format, generator: torch.Generator) -> list[str]:
    """Add a random float16 weight in a format's layout; returns the names of its initializers."""
    if form is Format.FLOAT16:
        weight = torch.randn(shape.k, shape.n, device=generator.device, generator=generator) * shape.k**-0.5
        return [builder.external(name, TensorProto.FLOAT16, [shape.k, shape.n], weight.half())]
    block = form.block
    weight = random_weight(shape, block, torch.float16, generator, structured=form.structured)
    if form in (Format.NBITS_128, Format.NBITS_32):
        packed, scale = _nbits(weight)
        blocks = weight.scale.shape[0]
        return [
            builder.external(name, TensorProto.UINT8, [shape.n, blocks, block // 2], packed),
            builder.external(f"{name}_scale", TensorProto.FLOAT16, [shape.n, blocks], scale),
        ]
    return [
        builder.external(name, TensorProto.INT4, [shape.k, shape.n], pack_int4(weight.values)),
        builder.external(f"{name}_scale", TensorProto.FLOAT16, list(weight.scale.shape), weight.scale),
    ]


def linear(builder: ModelBuilder, value: str, weight: Sequence[str], output: str, shape: Shape, form: Format) -> None:
    """Append one linear layer; layers that read one activation share its quantization.

    Args:
        builder: The model.
        value: The float16 activation.
        weight: What `store` returned.
        output: Name of the result.
        shape: The layer's.
        form: The weight's format.
    """
    if form is Format.FLOAT16:
        builder.node("MatMul", [value, *weight], [output])
        return
    if form in (Format.NBITS_128, Format.NBITS_32):
        attributes = {"K": shape.k, "N": shape.n, "bits": 4, "block_size": form.block}
        builder.node("MatMulNBits", [value, *weight], [output], "com.microsoft", **attributes)
        return
    quantized, scale = f"{value}_q", f"{value}_s"
    multiple = SCALE_MAX_MULTIPLE if form.structured else 0
    if form.one_op and not builder.makes(quantized):
        attributes = {"block_size": form.block, "scale_max_multiple": multiple}
        builder.node(ops.dynamic_quantize_w4a8_matmul.NAME, [value, *weight], [output], DOMAIN, **attributes)
        return
    if form is Format.W4A8_STATIC:
        # Chains of unit-variance layers keep their range: 5 standard deviations fill the int8 range.
        step = np.float16(5 / 127)
        scale = builder.constant("static_scale", np.array(step, np.float32))
        half = builder.constant("static_scale_half", np.array(step))
        zero_point = builder.constant("zero_point_128", np.array(ZERO_POINT, np.uint8))
        builder.node_once("QuantizeLinear", [value, half, zero_point], [quantized])
    else:
        builder.node_once("DynamicQuantizePerToken", [value], [quantized, scale], DOMAIN)
    w4a8_layer(builder, quantized, scale, weight, output, form.block, multiple)


def write_chain(
    path: Path, shapes: Sequence[Shape], form: Format, layers: int, copies: int, generator: torch.Generator
) -> Path:
    """Write a chain of `layers` linear layers in float16, X [M, K] -> Y [M, N].

    Args:
        path: The model's file.
        shapes: The layers' shapes, taken in turn; each one's N is the next one's K.
        form: The format of every layer.
        layers: Layers in the chain, a multiple of len(shapes).
        copies: Different weights per shape; layers beyond reuse them in turn.
        generator: Source of the weights.

    Raises:
        ValueError: The shapes do not chain.
    """
    if layers % len(shapes) or any(a.n != b.k for a, b in zip(shapes, [*shapes[1:], shapes[0]], strict=True)):
        raise ValueError(f"{[shape.label for shape in shapes]} do not chain {layers} times")
    builder = ModelBuilder(path)
    stored = {
        (index, copy): store(builder, f"w{index}_{copy}", shape, form, generator)
        for index, shape in enumerate(shapes)
        for copy in range(copies)
    }
    value = "X"
    for layer in range(layers):
        index, copy = layer % len(shapes), layer // len(shapes) % copies
        shape, weight = shapes[index], stored[index, copy]
        output = "Y" if layer == layers - 1 else f"h{layer}"
        linear(builder, value, weight, output, shape, form)
        value = output
    return builder.save(
        [helper.make_tensor_value_info("X", TensorProto.FLOAT16, ["M", shapes[0].k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT16, ["M", shapes[-1].n])],
    )


def static_scale(dtype: torch.dtype, largest: float = 6.0) -> torch.Tensor:
    """A per-tensor scale that maps -largest..largest onto int8, a value that `dtype` can hold, as float32 []."""
    return torch.tensor(largest / 127, dtype=dtype).float()


def layer_model(
    weight: Weight, activation: Activation, *, rank: int = 2, zero_point: int = ZERO_POINT, per_token: bool = True
) -> bytes:
    """One linear layer as a serialized model.

    Inputs: X [..., K] (PER_TOKEN, STATIC) or A uint8 [..., K] and a_scale float32 [..., 1] or [] (QUANTIZED).
    Outputs: Y [..., N]; for PER_TOKEN also A and a_scale, for STATIC also A, as the graph computed them.

    Args:
        weight: On any device.
        activation: Where the quantization happens.
        rank: Of the activation.
        zero_point: Of A; 128 unless QUANTIZED or STATIC.
        per_token: Shape of a_scale for QUANTIZED.
    """
    element = ELEMENT_TYPES[weight.scale.dtype]
    k, n = weight.values.shape
    leading = [f"d{axis}" for axis in range(rank - 1)]
    packed = pack_int4(weight.values).cpu().numpy().tobytes()
    scale_bytes = weight.scale.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    initializers = [
        helper.make_tensor("B", TensorProto.INT4, [k, n], packed, raw=True),
        helper.make_tensor("b_scale", element, list(weight.scale.shape), scale_bytes, raw=True),
        helper.make_tensor("zero_point", TensorProto.UINT8, [], bytes([zero_point]), raw=True),
    ]
    x = helper.make_tensor_value_info("X", element, [*leading, k])
    a = helper.make_tensor_value_info("A", TensorProto.UINT8, [*leading, k])
    a_scale = helper.make_tensor_value_info("a_scale", TensorProto.FLOAT, [*leading, 1] if per_token else [])
    outputs = [helper.make_tensor_value_info("Y", element, [*leading, n])]
    nodes = []
    if activation is Activation.PER_TOKEN:
        inputs, outputs = [x], [*outputs, a, a_scale]
        nodes.append(helper.make_node("DynamicQuantizePerToken", ["X"], ["A", "a_scale"], "quantize", domain=DOMAIN))
    elif activation is Activation.STATIC:
        inputs, outputs = [x], [*outputs, a]
        value = static_scale(weight.scale.dtype)
        typed = value.to(weight.scale.dtype).view(1).view(torch.uint8).numpy().tobytes()
        initializers.append(helper.make_tensor("x_scale", element, [], typed, raw=True))
        initializers.append(helper.make_tensor("a_scale", TensorProto.FLOAT, [], [float(value)]))
        nodes.append(helper.make_node("QuantizeLinear", ["X", "x_scale", "zero_point"], ["A"], "quantize"))
    else:
        inputs = [a, a_scale]
    nodes.append(
        helper.make_node(
            "W4A8MatMul",
            ["A", "a_scale", "zero_point", "B", "b_scale"],
            ["Y"],
            "matmul",
            domain=DOMAIN,
            block_size=weight.block,
            scale_max_multiple=weight.scale_max_multiple,
        )
    )
    return _model(helper.make_graph(nodes, "layer", inputs, outputs, initializers)).SerializeToString()
