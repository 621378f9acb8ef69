"""Run a model segment by segment, any of its layers quantized, on float states that are computed once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.analysis.segments import Link
from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.compare import expose

__all__ = ["Chain", "OpenSession", "Patch"]

Array = npt.NDArray[Any]
Values = Mapping[str, Array]
OpenSession = Callable[[ir.Model], Any]
Patch = Callable[[ir.Model, frozenset[str]], None]

# Sessions of quantized segments that are kept: those of the last model that was quantized as a whole.
_KEPT_SESSIONS = 80


class Chain:
    """The segments of one model behind lazily opened sessions.

    A run with quantized layers starts at the first segment that holds one; the states in front come from a float run
    on the same feeds, which happens once. It therefore gives bit for bit what running every segment gives.

    Args:
        segments: From `cut`.
        patch: Quantizes the named layers of a segment's model in place.
        open_session: Makes sessions, normally with the op library registered.
    """

    def __init__(self, segments: Sequence[Link], patch: Patch, open_session: OpenSession) -> None:
        """Open nothing yet."""
        self.segments = tuple(segments)
        self._patch = patch
        self._open = open_session
        self._float: dict[int, Any] = {}
        self._quantized: OrderedDict[tuple[int, frozenset[str]], Any] = OrderedDict()
        self._states: dict[bytes, list[dict[str, Array]]] = {}

    def run(self, feeds: Values, quantized: Iterable[str] = ()) -> dict[str, Array]:
        """Outputs of the whole model with the named layers quantized.

        Args:
            feeds: Complete feeds.
            quantized: Node names of linear layers.

        Raises:
            CalibrationError: onnxruntime refuses the model or the feeds.
        """
        wanted = frozenset(quantized)
        chosen = [frozenset(name for name in segment.layers if name in wanted) for segment in self.segments]
        first = next((index for index, layers in enumerate(chosen) if layers), len(self.segments) - 1)
        values = self.float_values(feeds, first)
        outputs: dict[str, Array] = {}
        for segment, layers in zip(self.segments[first:], chosen[first:], strict=True):
            outputs = _run(self._session(segment, layers), segment, values)
            values |= outputs
        return {name: values[name] for name in self.output_names}

    @property
    def output_names(self) -> tuple[str, ...]:
        """Outputs of the whole model: what no segment reads."""
        read = {name for segment in self.segments for name in segment.inputs}
        return tuple(name for segment in self.segments for name in segment.outputs if name not in read)

    def float_values(self, feeds: Values, stop: int) -> dict[str, Array]:
        """Everything that the float segments before `stop` give, with the feeds; kept for the next call."""
        states = self._states.setdefault(_digest(feeds), [])
        values = dict(feeds)
        for state in states[:stop]:
            values |= state
        for segment in self.segments[len(states) : stop]:
            states.append(_run(self._session(segment, frozenset()), segment, values))
            values |= states[-1]
        return values

    def observe(self, feeds: Values, segment: Link, names: Sequence[str]) -> dict[str, Array]:
        """Float values inside one segment by name, such as the inputs of its linear layers."""
        session = self._open(expose(segment.model, names))
        wanted = list(dict.fromkeys(names))
        values = self.float_values(feeds, segment.index)
        return dict(zip(wanted, session.run(wanted, {name: values[name] for name in segment.inputs}), strict=True))

    def model_of(self, segment: Link, quantized: frozenset[str]) -> ir.Model:
        """A segment's model with the named layers quantized, as its sessions run it."""
        if not quantized:
            return segment.model
        copy = segment.model.clone()
        self._patch(copy, quantized)
        return copy

    def _session(self, segment: Link, quantized: frozenset[str]) -> Any:
        if not quantized:
            if segment.index not in self._float:
                self._float[segment.index] = self._open(segment.model)
            return self._float[segment.index]
        key = (segment.index, quantized)
        if key in self._quantized:
            self._quantized.move_to_end(key)
        else:
            self._quantized[key] = self._open(self.model_of(segment, quantized))
            while len(self._quantized) > max(_KEPT_SESSIONS, len(self.segments)):
                self._quantized.popitem(last=False)
        return self._quantized[key]


def _run(session: Any, segment: Link, values: Values) -> dict[str, Array]:
    try:
        results = session.run(list(segment.outputs), {name: values[name] for name in segment.inputs})
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise CalibrationError(
            "evaluation data", f"cannot be run: {error}", "Check the data against the model"
        ) from error
    return dict(zip(segment.outputs, results, strict=True))


def _digest(feeds: Values) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        state.update(f"{name} {array.dtype} {array.shape}".encode())
        state.update(array.tobytes())
    return state.digest()
