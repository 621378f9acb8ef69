"""Hidden states between two segments, one entry per batch: in memory, or in a work directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from fptq_onnx.storage.work_dir import WorkDir

__all__ = ["States"]

Array = npt.NDArray[Any]
State = dict[str, Array]


class States:
    """What each batch carries from one segment to the next.

    States keep the type they have in the model, so that a cut model computes what the uncut one does: a float16 model
    has float16 states, and rounding those of a float32 model to half the size would change what its later blocks see.
    Where memory is short they lie on disk instead, a batch at a time in memory.

    Args:
        work: Where to keep them; None keeps them in memory.
        phase: Name of the pass over the model, part of the records' names.
    """

    def __init__(self, work: WorkDir | None, phase: str) -> None:
        """Nothing is stored yet; what an earlier process stored is found."""
        self._work, self._phase = work, phase
        self._held: dict[tuple[int, int], State] = {}

    def put(self, segment: int, batch: int, state: Mapping[str, Array]) -> None:
        """Store the values that are alive behind a segment."""
        if self._work is None:
            self._held[segment, batch] = dict(state)
            return
        self._work.save(self._name(segment, batch), state)

    def get(self, segment: int, batch: int) -> State:
        """The values behind a segment."""
        if self._work is None:
            return self._held[segment, batch]
        return self._work.load(self._name(segment, batch))[0]

    def drop(self, segment: int) -> None:
        """Forget the values behind a segment."""
        if self._work is None:
            self._held = {key: state for key, state in self._held.items() if key[0] != segment}
        else:
            self._work.discard(f"{self._phase}.state.{segment:04d}.")

    def _name(self, segment: int, batch: int) -> str:
        return f"{self._phase}.state.{segment:04d}.{batch:06d}"
