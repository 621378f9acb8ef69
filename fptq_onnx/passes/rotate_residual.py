"""Turn the residual stream of an RMSNorm decoder into coordinates without outlier channels, inside the weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.constants import constant_array, root_initializer
from fptq_onnx.graph.linears import LinearLayer, find_linears
from fptq_onnx.graph.residual import ResidualStream, RotationRefusedError, find_residual_stream
from fptq_onnx.passes.editing import add_constant
from fptq_onnx.passes.weights import Float32, Transform, replace_constant, replace_weight
from fptq_onnx.quantization.rotate import Rotation, random_rotation, rotate_inputs, rotate_outputs

__all__ = ["ResidualRotation", "RotateResidualPass"]

logger = logging.getLogger(__name__)

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ResidualRotation:
    """What `RotateResidualPass` did, for the report.

    Attributes:
        hidden: Channels of the stream.
        seed: Seed of the rotation.
        readers: Labels of the layers that became Q^T diag(gamma) W.
        writers: Labels of the layers that became W Q.
        norms: How many norm weights were folded and are ones now.
        into_table: The embedding table was rotated; otherwise a MatMul behind the lookup does it.
        nodes: Names of the inserted MatMul nodes; they stay float.
    """

    hidden: int
    seed: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    norms: int
    into_table: bool
    nodes: tuple[str, ...]


class RotateResidualPass(ir.passes.InPlacePass):
    """h' = h Q with an orthogonal Q for the residual stream h between embedding and head (QuaRot, SpinQuant).

    RMS(h Q) = RMS(h) Q, so the model computes the same function with

        x = norm(h) * gamma, x W + b   ->  norm(h') (Q^T diag(gamma) W) + b     q, k, v, gate, up
        h + (y W + b)                  ->  h' + (y (W Q) + b Q)                 o, down

    and outliers in a few channels of h spread over all channels. Only the ends of the stream see the difference: an
    embedding table that nobody else reads is rotated itself; one that is tied to lm_head stays, and a MatMul by Q
    follows the lookup. A MatMul by Q^T turns the stream back in front of the final norm, so that norm and lm_head stay
    bit for bit what they are. Each MatMul costs hidden^2 multiplications per token and hidden^2 floats in the file:
    together 0.5 % of SmolLM2-135M's, less in larger models. Their weights are [1, hidden, hidden], so they count as
    part of the stream and not as linear layers: `find_linears` gives the same layers, labels and blocks as before.

    All or nothing: where the stream cannot be rotated, the model is left as it is and `refused` says why.
    Weights become lazy tensors: they are rotated (in float64, rounded to their type) each time somebody reads them.

    Args:
        seed: Seed of the random signs of the Hadamard matrix.
    """

    def __init__(self, seed: int = 0) -> None:
        """Keep the seed; one of `applied` and `refused` is set when the pass runs."""
        self._seed = seed
        self.applied: ResidualRotation | None = None
        self.refused: str | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        self.applied = self.refused = None
        try:
            stream = find_residual_stream(model, find_linears(model))
        except RotationRefusedError as error:
            self.refused = str(error)
            logger.info("the residual stream is not rotated: %s", error)
            return ir.passes.PassResult(model, False)
        rotation = random_rotation(stream.hidden, self._seed)
        graph = model.graph
        dtype = _dtype(stream)
        _rotate_layers(graph, stream, rotation)
        for use in stream.constants:
            replace_constant(graph, *use, "rotated", lambda array: rotate_outputs(array, rotation))
        for node, index in stream.scales:
            _replace_by_ones(graph, node, index)
        nodes = []
        into_table = _rotate_table(graph, stream.start, rotation)
        if not into_table:
            nodes.append(_multiply(graph, stream.start, rotation.matrix, dtype, "residual.rotate"))
        end = _plain_sum(graph, stream.end)
        nodes.append(_multiply(graph, end, np.ascontiguousarray(rotation.matrix.T), dtype, "residual.rotate_back"))
        self.applied = ResidualRotation(
            stream.hidden,
            self._seed,
            tuple(reader.layer.label for reader in stream.readers),
            tuple(layer.label for layer in stream.writers),
            len(stream.scales),
            into_table,
            tuple(nodes),
        )
        logger.info("rotated the residual stream: %d readers, %d writers", len(stream.readers), len(stream.writers))
        return ir.passes.PassResult(model, True)


def _rotate_layers(graph: ir.Graph, stream: ResidualStream, rotation: Rotation) -> None:
    writers = set(stream.writers)
    reading = {reader.layer for reader in stream.readers}
    for layer, scale in stream.readers:
        operand = None if scale is None else scale.node.inputs[scale.idx]
        replace_weight(graph, layer, "rotated", _reading(layer, rotation, operand, layer in writers))
    for layer in stream.writers:
        if layer not in reading:
            replace_weight(graph, layer, "rotated", lambda weight: rotate_outputs(weight, rotation))


def _reading(layer: LinearLayer, rotation: Rotation, scale: ir.Value | None, writes: bool) -> Transform:
    """Q^T diag(gamma) W, and times Q for a layer that writes to the stream as well."""
    gamma = constant_array(scale)
    gamma = None if gamma is None else gamma.astype(np.float64).reshape(-1)

    def rotated(weight: Float32) -> Float32:
        weight = rotate_inputs(weight, rotation, gamma)
        return rotate_outputs(weight, rotation) if writes else weight

    return rotated


def _replace_by_ones(graph: ir.Graph, node: ir.Node, index: int) -> None:
    value = replace_constant(graph, node, index, "folded", np.ones_like)
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)  # no need to hold on to the old weight


def _rotate_table(graph: ir.Graph, start: ir.Value, rotation: Rotation) -> bool:
    """Rotate the embedding table if ``start`` is looked up in it and nobody else reads it."""
    lookup = start.producer()
    if lookup is None or lookup.op_type != "Gather" or lookup.domain != "" or lookup.attributes.get_int("axis", 0) != 0:
        return False
    found = root_initializer(lookup.inputs[0])
    if found is None:
        return False
    root, path = found
    if any(len(v.uses()) != 1 or v.is_graph_output() for v in (root, *(step.outputs[0] for step in path))):
        return False
    replace_constant(graph, lookup, 0, "rotated", lambda table: rotate_outputs(table, rotation))
    return True


def _multiply(graph: ir.Graph, value: ir.Value, matrix: Float64, dtype: ir.DataType, wanted: str) -> str:
    """Put a MatMul by ``matrix`` behind a value; whoever read the value reads the product."""
    taken = {name for node in graph for name in (node.name, node.outputs[0].name)}
    name = wanted if wanted not in taken else f"{wanted}.{len(taken)}"
    weight = add_constant(graph, f"{name}.weight", matrix[None].astype(dtype.numpy()))
    node = ir.node("MatMul", [value, weight], name=name)
    product = node.outputs[0]
    product.name, product.type, product.shape = name, ir.TensorType(dtype), value.shape
    value.replace_all_uses_with(product, replace_graph_outputs=True)
    node.replace_input_with(0, value)
    if product.is_graph_output():
        value.name, product.name = f"{value.name}.rotated", value.name
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, [node])
    else:
        graph.insert_before(graph[0], [node])
    return name


def _plain_sum(graph: ir.Graph, end: ir.Value) -> ir.Value:
    """Return the stream behind the last block as a value of its own: a fused skip norm is taken apart for it."""
    fused = end.producer()
    if fused is None or not fused.op_type.startswith("Skip"):
        return end
    stream, addend, weight, *rest = fused.inputs
    nodes = [ir.node("Add", [stream, addend], name=f"{fused.name}.add")]
    if rest and rest[0] is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], rest[0]], name=f"{fused.name}.bias"))
    total = nodes[-1].outputs[0]
    attributes = {"axis": -1, "epsilon": fused.attributes.get_float("epsilon", 1e-12), "stash_type": 1}
    norm = ir.node("SimplifiedLayerNormalization", [total, weight], attributes, name=f"{fused.name}.norm")
    nodes.append(norm)
    for node in nodes:
        output = node.outputs[0]
        output.name, output.type, output.shape = node.name, fused.outputs[0].type, fused.outputs[0].shape
    graph.insert_before(fused, nodes)
    replaced = [(fused.outputs[0], norm.outputs[0])]
    if len(fused.outputs) > 3:
        replaced.append((fused.outputs[3], total))
    for old, new in replaced:
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if old.name:
            old.name, new.name = None, old.name
    graph.remove(fused, safe=True)
    return total


def _dtype(stream: ResidualStream) -> ir.DataType:
    """The type of the stream; files may lack the types of inner values, and then it is that of the weights."""
    candidates = (stream.start.dtype, stream.end.dtype, stream.writers[0].weight.dtype)
    return next(dtype for dtype in candidates if dtype is not None)
