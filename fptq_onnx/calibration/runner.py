"""Runs a model over calibration data, one batch at a time, and keeps only statistics."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.observation import SELECTION_PREFIX, Observation, build_observation
from fptq_onnx.calibration.observers import Observer, StatisticsObserver, TokenGroup
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import Feeds, describe_inputs
from fptq_onnx.progress import Progress, SilentProgress
from fptq_onnx.quantization.statistics import ActivationStatistics

__all__ = [
    "ObservedActivation",
    "ObservedData",
    "ObservedRun",
    "SessionFactory",
    "TokenPositions",
    "calibrate",
    "observe",
    "token_masks",
]

logger = logging.getLogger(__name__)

SessionFactory = Callable[[ir.Model], Any]
TokenPositions = npt.NDArray[np.int64] | None
TokenMasks = Mapping[TokenGroup, npt.NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class ObservedActivation:
    """Statistics of one activation.

    Attributes:
        name: The graph value.
        rest: All tokens, or those after the leading ones.
        leading: The first `leading_tokens` positions of each sequence; None if they were not kept apart.
    """

    name: str
    rest: ActivationStatistics
    leading: ActivationStatistics | None = None

    @cached_property
    def all(self) -> ActivationStatistics:
        """Statistics of all tokens, the leading ones first in `token_absmax`."""
        return self.rest if self.leading is None else self.leading.merge(self.rest)


@dataclass(frozen=True)
class ObservedData:
    """How much data was run: batches, sequences and tokens (without padding; rows where there are no sequences)."""

    batches: int
    sequences: int
    tokens: int


def calibrate(
    model: ir.Model,
    activations: Sequence[str],
    batches: Iterable[Mapping[str, npt.NDArray[Any]]],
    *,
    leading_tokens: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, ObservedActivation]:
    """Exact statistics of activations over all batches, in memory of O(channels) and 4 bytes per token.

    Args:
        model: The float model; left as it is.
        activations: Names of values of rank 2 or more, [..., K]; repeated names are observed once.
        batches: Feeds by input name; what follows from token ids (mask, positions, empty cache) may be missing.
        leading_tokens: Positions at the start of each sequence to keep apart ("attention sinks"), 0 for none.
        providers: Execution providers.
        threads: Intra-op threads, onnxruntime's choice if None.
        progress: Told of each batch.

    Returns:
        The statistics by name, in the order of `activations`. Padding (zeros of the attention mask) is not counted.

    Raises:
        CalibrationError: No data, data that do not fit the model, an unknown activation, or NaN or infinity in one.
    """
    groups = (TokenGroup.LEADING, TokenGroup.REST) if leading_tokens else (TokenGroup.ALL,)
    observers = {name: [StatisticsObserver(name, group) for group in groups] for name in activations}
    observe(
        model,
        [observer for pair in observers.values() for observer in pair],
        batches,
        leading_tokens=leading_tokens,
        session_factory=lambda copy: memory_session(copy, providers, threads=threads),
        progress=progress,
    )
    return {
        name: ObservedActivation(name, rest.statistics, leading[0].statistics if leading else None)
        for name, (*leading, rest) in observers.items()
    }


def observe(
    model: ir.Model,
    observers: Sequence[Observer],
    batches: Iterable[Mapping[str, npt.NDArray[Any]]],
    *,
    leading_tokens: int = 0,
    session_factory: SessionFactory = memory_session,
    progress: Progress | None = None,
) -> ObservedData:
    """Run a model over all batches and fold what the observers reduce inside the graph.

    Args:
        model: Left as it is.
        observers: Fresh observers; they hold the results afterwards. Without any the data are only checked.
        batches: As for `calibrate`.
        leading_tokens: Positions of each sequence that are TokenGroup.LEADING, the others being REST.
        session_factory: Makes the session of the observation copy.
        progress: Told of each batch.

    Raises:
        CalibrationError: As for `calibrate`.
    """
    inputs = describe_inputs(model)
    run = ObservedRun(model, observers, session_factory=session_factory)
    count = sequences = tokens = 0
    total = operator.length_hint(batches) or None
    with (progress or SilentProgress()).stage("Calibrating", total) as advance:
        for count, batch in enumerate(batches, start=1):
            where = f"calibration batch {count}"
            feeds = inputs.complete(batch, where)
            positions = inputs.token_positions(feeds)
            run.feed(feeds, token_masks(positions, leading_tokens, where), positions, where)
            sequences += next(iter(feeds.values())).shape[0] if positions is None else positions.shape[0]
            tokens += 0 if positions is None else int(np.count_nonzero(positions >= 0))
            advance(1)
    if count == 0:
        raise CalibrationError("calibration data", "hold no batch", "Give at least one sequence")
    logger.info("observed %d activations over %d batches, %d tokens", len(observers), count, tokens)
    return ObservedData(count, sequences, tokens)


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
