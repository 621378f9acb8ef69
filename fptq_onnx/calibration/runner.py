"""Runs a model, or a part of it, over calibration data one batch at a time, and keeps only statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.observation import SELECTION_PREFIX, Observation, build_observation
from fptq_onnx.calibration.observers import Observer, TokenGroup
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import Feeds

__all__ = ["ObservedRun", "SessionFactory", "token_masks"]

SessionFactory = Callable[[ir.Model], Any]
TokenPositions = npt.NDArray[np.int64] | None
TokenMasks = Mapping[TokenGroup, npt.NDArray[np.bool_]]


def token_masks(positions: TokenPositions, leading_tokens: int, where: str) -> dict[TokenGroup, npt.NDArray[np.bool_]]:
    """Mask [B * S] of each token group; empty where every token counts alike."""
    if positions is None:
        if leading_tokens:
            raise CalibrationError(where, "has no token ids to tell leading tokens by", "Set leading tokens to 0")
        return {}
    flat = positions.ravel()
    real = flat >= 0
    if not real.any():
        raise CalibrationError(where, "holds only padding", "Leave it out, or correct its attention mask")
    if leading_tokens == 0 and real.all():
        return {}
    return {
        TokenGroup.ALL: real,
        TokenGroup.LEADING: real & (flat < leading_tokens),
        TokenGroup.REST: flat >= leading_tokens,
    }


class ObservedRun:
    """Runs one model batch by batch and folds what observers reduce inside it; the session is made for the first batch.

    Args:
        model: Left as it is.
        observers: Fresh observers.
        keep: Names of values that `feed` returns as they are.
        session_factory: Makes the session of the observation copy.
    """

    def __init__(
        self,
        model: ir.Model,
        observers: Sequence[Observer],
        *,
        keep: Sequence[str] = (),
        session_factory: SessionFactory = memory_session,
    ) -> None:
        """Nothing is built yet."""
        self._model, self._observers, self._keep = model, observers, list(keep)
        self._session_factory = session_factory
        self._session: Any = None
        self._observation: Observation | None = None
        self._inputs: frozenset[str | None] = frozenset()

    def feed(
        self, feeds: Mapping[str, npt.NDArray[Any]], masks: TokenMasks, positions: TokenPositions, where: str
    ) -> Feeds:
        """Run one batch.

        Args:
            feeds: Complete feeds; what the model does not take is left out.
            masks: From `token_masks`.
            positions: Positions of the batch's tokens, None where there are none.
            where: How to name the batch in an error.

        Returns:
            The values to keep, by name.
        """
        if not self._observers and not self._keep:
            return {}
        if self._observation is None or (masks and not self._observation.selections):
            # Masks cost a copy of every activation, so they are built in only once a batch needs them.
            self._session = None
            observation = build_observation(self._model, self._observers, select_tokens=bool(masks), keep=self._keep)
            self._inputs = frozenset(value.name for value in observation.model.graph.inputs)
            self._session = self._session_factory(observation.model)
            self._observation = observation
        observation = self._observation
        fed = {name: array for name, array in feeds.items() if name in self._inputs}
        if observation.selections and positions is not None:
            masks = masks or {TokenGroup.ALL: np.ones(positions.size, np.bool_)}
            fed |= {f"{SELECTION_PREFIX}{group}": masks[group] for group in observation.selections}
        names = [*self._keep, *(name for outputs in observation.outputs for name in outputs)]
        try:
            results = dict(zip(names, self._session.run(names, fed), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise CalibrationError(where, f"cannot be run: {error}", "Check the data against the model") from error
        for observer, outputs in zip(self._observers, observation.outputs, strict=True):
            try:
                observer.fold(*(results[name] for name in outputs))
            except CalibrationError as error:
                raise CalibrationError(f"{where}, {error.where}", error.reason, error.fix) from error
        return {name: results[name] for name in self._keep}
