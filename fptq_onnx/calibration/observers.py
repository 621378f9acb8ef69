"""Observers: each reduces an activation inside the graph and folds the small results of all batches outside it."""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.nodes import NodeBuilder
from fptq_onnx.errors import CalibrationError
from fptq_onnx.quantization.statistics import HISTOGRAM_BINS, HISTOGRAM_RESOLUTION, ActivationStatistics

__all__ = [
    "ChannelRangeObserver",
    "HistogramObserver",
    "Observer",
    "StatisticsObserver",
    "TokenAbsmaxObserver",
    "TokenGroup",
]

Array = npt.NDArray[Any]


class TokenGroup(enum.StrEnum):
    """Which positions of the sequences an observer sees; never padding.

    A token is a row of the activation flattened to [tokens, K]. Where the rows are not those of the batch of token
    ids, such as the pooled output of an encoder, all of them count as ALL and REST and none as LEADING.
    """

    ALL = "all"
    LEADING = "leading"
    REST = "rest"


class Observer(abc.ABC):
    """One observation of one or more activations. A subclass is all that a new statistic takes.

    An observer is used for one pass over the data, in which `fold` is called once per batch.

    Attributes:
        values: Names of the graph values it reads, such as one activation, or an activation and its quantized twin.
        tokens: The tokens of them that it sees.
    """

    def __init__(self, *values: str, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Observe `values`."""
        self.values = values
        self.tokens = tokens

    @abc.abstractmethod
    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """Add the reducing nodes; keeps no state, as a graph may be built twice.

        Args:
            nodes: Makes the nodes.
            *tokens: float32 [T, K] of each value, T >= 0 being dynamic.

        Returns:
            What to fetch after each batch. Keep it small: all observers' results of a batch are held together.
        """

    @abc.abstractmethod
    def fold(self, *arrays: Array) -> None:
        """Add the results of one batch.

        Raises:
            CalibrationError: The activation is not finite.
        """


class ChannelRangeObserver(Observer):
    """Minimum and maximum of each channel."""

    channel_min: Array
    channel_max: Array

    def __init__(self, value: str, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Observe one activation."""
        super().__init__(value, tokens=tokens)
        self.channel_min = np.zeros(0, np.float32)
        self.channel_max = np.zeros(0, np.float32)
        self._seen = False

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """Two vectors [K], infinite for T = 0."""
        return nodes.reduce("ReduceMin", tokens[0], axis=0), nodes.reduce("ReduceMax", tokens[0], axis=0)

    def fold(self, *arrays: Array) -> None:
        """Combine minima and maxima. NaN is not seen here: onnxruntime's vectorized reductions may drop it."""
        low, high = (array + np.float32(0) for array in arrays)  # no -0, so that equal results have equal bits
        if not self._seen:
            self.channel_min, self.channel_max, self._seen = low, high, True
            return
        if low.shape != self.channel_min.shape:
            raise CalibrationError(
                f"activation {self.values[0]}",
                f"has {low.size} channels after {self.channel_min.size} in an earlier batch",
                "Observe activations with a fixed last dimension",
            )
        self.channel_min = np.minimum(self.channel_min, low)
        self.channel_max = np.maximum(self.channel_max, high)


class TokenAbsmaxObserver(Observer):
    """Largest magnitude of each token; also the guard against NaN and infinity."""

    def __init__(self, value: str, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Observe one activation."""
        super().__init__(value, tokens=tokens)
        self._parts: list[Array] = []

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """Two vectors [T]: the maximum of |x|, and its sum, through which NaN and infinity always show."""
        magnitude = nodes.op("Abs", tokens[0])
        return nodes.reduce("ReduceMax", magnitude, axis=1), nodes.reduce("ReduceL1", tokens[0], axis=1)

    def fold(self, *arrays: Array) -> None:
        """Append the tokens of a batch."""
        absmax, total = arrays
        broken = np.count_nonzero(~np.isfinite(total))
        if broken:
            raise CalibrationError(
                f"activation {self.values[0]}",
                f"is NaN or infinite in {broken} of {total.size} tokens",
                "Check the model in a wider type (float16 overflows at 65504) and its inputs",
            )
        self._parts.append(absmax)

    @property
    def token_absmax(self) -> Array:
        """float32 [tokens], in the order of the data."""
        return np.concatenate([np.zeros(0, np.float32), *self._parts])


class HistogramObserver(Observer):
    """Histogram of |x| over the bins of `statistics.histogram_bins`."""

    def __init__(self, value: str, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Observe one activation."""
        super().__init__(value, tokens=tokens)
        self.histogram = np.zeros(HISTOGRAM_BINS, np.int64)

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """Counts [1024] and the shape [2] they belong to."""
        root = nodes.op("Sqrt", nodes.op("Sqrt", nodes.op("Abs", tokens[0])))
        scaled = nodes.op("Mul", root, nodes.constant(np.float32(HISTOGRAM_RESOLUTION)))
        top = nodes.op("Min", scaled, nodes.constant(np.float32(HISTOGRAM_BINS - 1)))
        bins = nodes.op("Cast", top, to=int(ir.DataType.INT32))
        # NaN becomes any integer; keep it a valid index, so that the run ends and TokenAbsmaxObserver can name it.
        bins = nodes.op("Clip", bins, nodes.constant(np.int32(0)), nodes.constant(np.int32(HISTOGRAM_BINS - 1)))
        flat = nodes.op("Reshape", bins, nodes.constant(np.array([-1], np.int64)))
        ones = nodes.op("Expand", nodes.constant(np.ones(1, np.int32)), nodes.op("Shape", flat))
        zeros = nodes.constant(np.zeros(HISTOGRAM_BINS, np.int32))
        counts = nodes.op("ScatterElements", zeros, flat, ones, axis=0, reduction="add")
        return counts, nodes.op("Shape", tokens[0])

    def fold(self, *arrays: Array) -> None:
        """Add the counts of a batch."""
        counts, shape = arrays
        counts = counts.astype(np.int64)
        if int(counts.sum()) != int(np.prod(shape)):
            raise CalibrationError(
                f"activation {self.values[0]}",
                f"has too many values in one batch to count ({shape[0]} x {shape[1]})",
                "Use smaller batches",
            )
        self.histogram += counts


class StatisticsObserver(Observer):
    """Everything in `ActivationStatistics`, from the three observers above."""

    def __init__(self, value: str, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Observe one activation."""
        super().__init__(value, tokens=tokens)
        self._range = ChannelRangeObserver(value, tokens)
        self._absmax = TokenAbsmaxObserver(value, tokens)
        self._histogram = HistogramObserver(value, tokens)

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """The results of the three, two each."""
        parts = (self._absmax, self._range, self._histogram)
        return [value for part in parts for value in part.reduce(nodes, *tokens)]

    def fold(self, *arrays: Array) -> None:
        """Fold a batch, the guard against NaN first."""
        self._absmax.fold(*arrays[0:2])
        self._range.fold(*arrays[2:4])
        self._histogram.fold(*arrays[4:6])

    @property
    def statistics(self) -> ActivationStatistics:
        """The statistics of all batches so far."""
        token_absmax = self._absmax.token_absmax
        return ActivationStatistics(
            channel_min=self._range.channel_min,
            channel_max=self._range.channel_max,
            token_absmax=token_absmax,
            histogram=self._histogram.histogram,
            tokens=token_absmax.size,
        )
