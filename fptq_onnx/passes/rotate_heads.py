"""Rotate the channels of each value head, inside the value and output projections of every attention."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.graph.heads import HeadTarget, find_value_heads
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.residual import RotationRefusedError
from fptq_onnx.passes.weights import Float32, Transform, replace_constant, replace_weight
from fptq_onnx.quantization.rotate import Rotation, random_rotation, rotate_head_inputs, rotate_head_outputs

__all__ = ["HeadRotation", "RotateHeadsPass"]

logger = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeadRotation:
    """What `RotateHeadsPass` did, for the report.

    Attributes:
        head_sizes: Channels of one head, each size once.
        seed: Seed of the rotation.
        sources: Labels of the layers whose value columns were rotated, one per attention.
        readers: Labels of the layers whose rows were rotated.
        changes_cache: The values in the key-value cache come out rotated: caches of the model before and after must
            not be mixed. The logits stay the same.
    """

    head_sizes: tuple[int, ...]
    seed: int
    sources: tuple[str, ...]
    readers: tuple[str, ...]
    changes_cache: bool


class RotateHeadsPass(ir.passes.InPlacePass):
    """V' = V R and W_o' = R^T W_o for every head, with an orthogonal R [d, d] (SpinQuant's R2).

    Attention adds up tokens, P V, and never mixes channels, so (P V R)(R^T W_o) = (P V) W_o. Query heads that share a
    value head share its rotation; the value columns of a packed qkv are rotated alone. Encoders and decoders alike,
    whatever their norms are. Nothing is added to the graph.

    All or nothing: where one attention does not allow it, the model is left as it is and `refused` says why.
    Weights become lazy tensors: they are rotated (in float64, rounded to their type) each time somebody reads them.

    Args:
        seed: Seed of the random signs of the Hadamard matrix.
    """

    def __init__(self, seed: int = 0) -> None:
        """Keep the seed; one of `applied` and `refused` is set when the pass runs."""
        self._seed = seed
        self.applied: HeadRotation | None = None
        self.refused: str | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run on the main graph of `model`."""
        self.applied = self.refused = None
        try:
            attentions = find_value_heads(model, find_linears(model))
        except RotationRefusedError as error:
            self.refused = str(error)
            logger.info("the value heads are not rotated: %s", error)
            return ir.passes.PassResult(model, False)
        graph = model.graph
        sizes = tuple(sorted({attention.head_size for attention in attentions}))
        rotations = {size: random_rotation(size, self._seed) for size in sizes}
        for attention in attentions:
            rotation = rotations[attention.head_size]
            for part in attention.targets:
                for use in part.target.uses:
                    replace_constant(graph, *use, "rotated", _value(part, rotation))
            for layer in attention.layers:
                replace_weight(graph, layer, "rotated", _output(attention.rows, rotation))
        self.applied = HeadRotation(
            sizes,
            self._seed,
            tuple(attention.source.label for attention in attentions),
            tuple(layer.label for attention in attentions for layer in attention.layers),
            any(attention.changes_cache for attention in attentions),
        )
        logger.info("rotated the value heads of %d attentions", len(attentions))
        return ir.passes.PassResult(model, True)


def _value(part: HeadTarget, rotation: Rotation) -> Transform:
    """Rotate the entries of each head along the target's axis."""
    axis, entries = part.target.axis, part.entries.reshape(-1)

    def rotated(array: Float32) -> Float32:
        result = array.copy()
        columns = np.moveaxis(result, axis, -1)  # a view
        held = columns[..., entries]
        columns[..., entries] = rotate_head_outputs(held.reshape(-1, entries.size), rotation).reshape(held.shape)
        return result

    return rotated


def _output(rows: Int64, rotation: Rotation) -> Transform:
    """Undo it in the rows that read each head."""
    order = rows.reshape(-1)

    def rotated(weight: Float32) -> Float32:
        result = np.empty_like(weight)
        result[order] = rotate_head_inputs(weight[order], rotation)
        return result

    return rotated
