"""Carries the calibration data through a model segment by segment, with the weights of one segment in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.observers import Observer
from fptq_onnx.calibration.runner import ObservedRun, SessionFactory, token_masks
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import Feeds, ModelInputs
from fptq_onnx.graph.model_file import release_mappings
from fptq_onnx.graph.segments import Segment, Segmentation, extract_segment
from fptq_onnx.progress import Advance
from fptq_onnx.storage.states import States

__all__ = ["Walk", "weights_in_memory"]

logger = logging.getLogger(__name__)


class Walk:
    """One pass of all batches through a model, a segment at a time.

    A segment is a session of its own, fed with what the segments before it gave. Statistics are those of the uncut
    model: bit for bit where onnxruntime computes the same kernels for the cut graph; where it would have fused
    operators across a cut, or keeps float32 between neighbouring float16 operators, within rounding.

    Args:
        model: Left as it is.
        segments: How it is cut.
        inputs: Of the model.
        batches: Feeds by input name; iterated for every run, so not a generator.
        states: Where hidden states are kept.
        leading_tokens: Positions of each sequence that are TokenGroup.LEADING, the others being REST.
        session_factory: Makes the sessions.
        last: Index of the last segment that matters; behind it no state is kept.
    """

    def __init__(
        self,
        model: ir.Model,
        segments: Segmentation,
        inputs: ModelInputs,
        batches: Iterable[Mapping[str, npt.NDArray[Any]]],
        states: States,
        *,
        leading_tokens: int,
        session_factory: SessionFactory,
        last: int,
    ) -> None:
        """Nothing is run yet."""
        self._model, self._segments, self._inputs, self._batches = model, segments, inputs, batches
        self._states, self._leading_tokens, self._session_factory = states, leading_tokens, session_factory
        self._last = last
        self._read_later = _read_later(segments)

    def run(
        self,
        segment: Segment,
        observers: Sequence[Observer],
        advance: Advance = lambda steps: None,
        *,
        carry: bool = True,
    ) -> None:
        """Run all batches through a segment, whose predecessor was run before or in an earlier process.

        Args:
            segment: The segment.
            observers: What to observe in it.
            advance: Told of each batch.
            carry: Store what later segments read. Not needed when a segment is run again for further observers.

        Raises:
            CalibrationError: Data that do not fit the model, or NaN or infinity in an activation.
        """
        for _ in self._pass(segment, observers, (), carry):
            advance(1)

    def expose(self, segment: Segment, names: Sequence[str]) -> Iterator[Feeds]:
        """Run all batches through a segment and give values of it by name, batch by batch; all must be taken.

        Args:
            segment: The segment.
            names: Of values that it computes.
        """
        return self._pass(segment, (), names, True)

    def _pass(
        self, segment: Segment, observers: Sequence[Observer], names: Sequence[str], carry: bool
    ) -> Iterator[Feeds]:
        alive = self._read_later[segment.index]
        carries = carry and bool(alive) and segment.index < self._last
        observed = {name for observer in observers for name in observer.values}
        if not carries and not observed and not names:
            return
        keep = dict.fromkeys([*(str(value.name) for value in segment.outputs if carries), *names])
        part = extract_segment(self._model, segment, sorted({*observed, *names}))
        run = ObservedRun(part, observers, keep=list(keep), session_factory=self._session_factory)
        count = 0
        for count, batch in enumerate(self._batches, start=1):
            where = f"calibration batch {count}"
            feeds = self._inputs.complete(batch, where)
            positions = self._inputs.token_positions(feeds)
            masks = token_masks(positions, self._leading_tokens, where)
            state = self._state(segment, count)
            if count == 1:
                _declare(part, segment, state)
            found = run.feed({**feeds, **state}, masks, positions, where)
            if carries:
                later = {name: array for name, array in {**state, **found}.items() if name in alive}
                self._states.put(segment.index, count, later)
            yield {name: found[name] for name in names}
        if count == 0:
            raise CalibrationError("calibration data", "hold no batch", "Give at least one sequence")

    def done(self, segment: Segment) -> None:
        """Forget the states that this segment was fed with, and unmap its weights."""
        release_mappings(self._model)
        if segment.index:
            self._states.drop(segment.index - 1)

    def _state(self, segment: Segment, batch: int) -> Mapping[str, npt.NDArray[Any]]:
        before = segment.index - 1
        return self._states.get(before, batch) if before >= 0 and self._read_later[before] else {}


def _read_later(segments: Segmentation) -> list[frozenset[str]]:
    """For each segment the values of it and of earlier ones that later ones read."""
    made = {str(value.name): segment.index for segment in segments for value in segment.outputs}
    last = {str(value.name): segment.index for segment in segments for value in segment.inputs}
    return [
        frozenset(name for name, index in made.items() if index <= segment.index < last[name]) for segment in segments
    ]


def _declare(part: ir.Model, segment: Segment, state: Mapping[str, npt.NDArray[Any]]) -> None:
    """Give the carried inputs the types of the arrays; graphs may lack them on inner values, or record other sizes."""
    carried = {str(value.name) for value in segment.inputs}
    for value in part.graph.inputs:
        if value.name not in carried:
            continue
        array = state[str(value.name)]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        recorded = value.shape
        fits = (
            recorded is not None
            and recorded.rank() == array.ndim
            and all(not isinstance(d, int) or d == size for d, size in zip(recorded, array.shape, strict=True))
        )
        if not fits:
            value.shape = ir.Shape([None] * array.ndim)


@contextmanager
def weights_in_memory(model: ir.Model, segment: Segment) -> Iterator[None]:
    """Compute the lazy weights of a segment (rotated, equalized) once, for all who read them inside the context."""
    lazy = {
        operand: operand.const_value
        for node in segment.nodes
        for operand in node.inputs
        if operand is not None and isinstance(operand.const_value, ir.LazyTensor)
    }
    for value, tensor in lazy.items():
        value.const_value = ir.Tensor(np.asarray(tensor.numpy()), dtype=tensor.dtype, name=value.name)
    try:
        yield
    finally:
        for value, tensor in lazy.items():
            value.const_value = tensor
