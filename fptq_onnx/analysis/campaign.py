"""Runs many experiments in order of interest, within a budget of time, and forgets none of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from fptq_onnx.analysis.executors import Executor
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.progress import Progress

__all__ = ["Campaign"]


class Campaign:
    """Measurements of one analysis: from the store where they were made before, else from the executor.

    Args:
        laboratory: Of this process.
        executor: Where new measurements run.
        seconds: Time for all of them, None for no limit.
        progress: Told of each measurement.

    Attributes:
        skipped: How many experiments of each title were left out for lack of time.
    """

    def __init__(self, laboratory: Laboratory, executor: Executor, seconds: float | None, progress: Progress) -> None:
        """The clock starts now."""
        self.laboratory, self._executor, self._progress = laboratory, executor, progress
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.skipped: dict[str, int] = {}
        self.made = 0

    def until(self, share: float) -> float | None:
        """The moment at which `share` of the time that is left now will have passed; None without a limit."""
        return None if self._deadline is None else time.monotonic() + share * max(0.0, self.seconds_left or 0.0)

    @property
    def seconds_left(self) -> float | None:
        """Time left; None without a limit."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def known(self, experiments: Sequence[Experiment]) -> dict[Experiment, Measurement]:
        """Those of the experiments that were measured already."""
        store = self.laboratory.store
        return {e: measured for e in experiments if (measured := store.get(e)) is not None}

    def one(self, experiment: Experiment, title: str) -> Measurement:
        """A measurement that nothing can go on without, whatever the time."""
        known = self.laboratory.store.get(experiment)
        if known is not None:
            return known
        with self._progress.stage(title, 1) as advance:
            measured = self.laboratory.measure(experiment)
            self.laboratory.store.record(experiment, measured)
            self.made += 1
            advance(1)
        return measured

    def several(
        self, experiments: Sequence[Experiment], title: str, until: float | None = None
    ) -> dict[Experiment, Measurement]:
        """Measure experiments, the first ones first, until the time is over; what was measured.

        Args:
            experiments: In order of interest.
            title: For progress and `skipped`.
            until: When to begin no more of them, as `time.monotonic` counts; None for the end of the budget.
        """
        experiments = list(dict.fromkeys(experiments))
        found = self.known(experiments)
        missing = [experiment for experiment in experiments if experiment not in found]
        limit = self._deadline if until is None else until
        if missing:
            with self._progress.stage(title, len(missing)) as advance:
                for experiment, measured in self._executor.run(self._in_time(missing, limit)):
                    self.laboratory.store.record(experiment, measured)
                    found[experiment] = measured
                    self.made += 1
                    advance(1)
        left = len(experiments) - len(found)
        if left:
            self.skipped[title] = self.skipped.get(title, 0) + left
        return found

    @staticmethod
    def _in_time(experiments: Sequence[Experiment], limit: float | None) -> Iterator[Experiment]:
        for experiment in experiments:
            if limit is not None and time.monotonic() >= limit:
                return
            yield experiment
