"""Statistics of a whole model, as `convert` gathers them from one that it cannot cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.observers import Observer, StatisticsObserver, TokenGroup
from fptq_onnx.calibration.runner import SessionFactory
from fptq_onnx.calibration.walk import Walk
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.segments import whole
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.storage.states import States

Batches = Iterable[Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class ObservedActivation:
    """Statistics of the first tokens of each sequence (None if they were not kept apart) and of the rest."""

    rest: ActivationStatistics
    leading: ActivationStatistics | None

    @property
    def all(self) -> ActivationStatistics:
        """Of all tokens, the leading ones first in `token_absmax`."""
        return self.rest if self.leading is None else self.leading.merge(self.rest)


def observe(
    model: ir.Model,
    observers: Sequence[Observer],
    batches: Batches,
    *,
    leading_tokens: int = 0,
    session_factory: SessionFactory = memory_session,
) -> None:
    """Run all batches through the model; the observers hold the results afterwards."""
    cut = whole(model, "it is observed whole")
    walk = Walk(
        model,
        cut,
        describe_inputs(model),
        batches,
        States(None, "whole"),
        leading_tokens=leading_tokens,
        session_factory=session_factory,
        last=0,
    )
    walk.run(cut.segments[0], observers)


def calibrate(
    model: ir.Model, activations: Sequence[str], batches: Batches, *, leading_tokens: int = 0
) -> dict[str, ObservedActivation]:
    """Statistics of activations by name."""
    groups = (TokenGroup.LEADING, TokenGroup.REST) if leading_tokens else (TokenGroup.ALL,)
    observers = {name: [StatisticsObserver(name, group) for group in groups] for name in activations}
    observe(
        model,
        [observer for pair in observers.values() for observer in pair],
        batches,
        leading_tokens=leading_tokens,
        session_factory=partial(memory_session, threads=1),
    )
    return {
        name: ObservedActivation(rest.statistics, leading[0].statistics if leading else None)
        for name, (*leading, rest) in observers.items()
    }
