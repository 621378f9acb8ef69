"""A few tokens of an activation as they are, for choices that need the output error of the layers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.nodes import NodeBuilder
from fptq_onnx.calibration.observers import Observer, TokenGroup

__all__ = ["SampleObserver", "sample_stride"]

_LEAST_PER_BATCH = 4


def sample_stride(wanted: int, batches: int, tokens: int) -> int:
    """Every how many tokens to take one, so that about ``wanted`` of all ``tokens`` are kept, 4 of a batch at least."""
    per_batch = max(1, tokens // max(batches, 1) // _LEAST_PER_BATCH)
    return max(1, min(tokens // max(wanted, 1), per_batch))


class SampleObserver(Observer):
    """Every ``stride``-th token of each batch, the first one among them.

    Args:
        value: Name of the activation.
        stride: See `sample_stride`.
        tokens: Which tokens to choose from.
    """

    def __init__(self, value: str, stride: int, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Start empty."""
        super().__init__(value, tokens=tokens)
        self._stride = stride
        self._kept: list[npt.NDArray[np.float32]] = []

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """The chosen rows [about T / stride, K]."""
        ends = (np.array([edge], np.int64) for edge in (0, np.iinfo(np.int64).max, 0, self._stride))
        return (nodes.op("Slice", tokens[0], *(nodes.constant(end) for end in ends)),)

    def fold(self, *arrays: npt.NDArray[Any]) -> None:
        """Keep the rows of a batch."""
        self._kept.append(np.asarray(arrays[0], np.float32))

    @property
    def sample(self) -> npt.NDArray[np.float32]:
        """All rows kept, float32 [tokens, K]."""
        return np.concatenate(self._kept) if self._kept else np.zeros((0, 0), np.float32)
