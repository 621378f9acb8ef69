"""Timing rules shared by the three modes: peers interleaved, medians with their range, CUDA-graph replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

__all__ = ["ROUNDS", "CapturedCalls", "Timing", "interleave"]

ROUNDS = 5
MIN_SAMPLE_MS = 4.0


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median of the rounds and their range."""

    median_us: float
    min_us: float
    max_us: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Timing:
        """Summarize one sample per round."""
        return cls(statistics.median(samples_us), min(samples_us), max(samples_us))

    def as_dict(self) -> dict[str, float]:
        """The three figures, rounded to a nanosecond."""
        return {key: round(value, 3) for key, value in asdict(self).items()}


def interleave(timers: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time every peer once per round, all peers in turn, so that drift of the clocks meets them alike.

    Args:
        timers: Per peer a callable that runs one sample and returns its microseconds per call.
        rounds: Samples per peer.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    return {name: Timing.of(values) for name, values in samples.items()}


class CapturedCalls:
    """One CUDA graph of many kernel calls, each on other weights; calling it returns microseconds per call.

    The graph keeps launch gaps out of the figure. One sample replays it until about `MIN_SAMPLE_MS` have passed.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        """Warm up (library handles, run-time compilation) and capture `calls` in order."""
        import torch

        self._count = len(calls)
        self._calls = list(calls)  # they own the buffers that the graph's kernels read and write
        self._graph = torch.cuda.CUDAGraph()
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
            calls[-1]()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self._repeats = 1
        self._replay()
        self._repeats = max(1, round(MIN_SAMPLE_MS * 1000 / (self._replay() * self._count)))

    def _replay(self) -> float:
        self._begin.record()
        for _ in range(self._repeats):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1000 / (self._repeats * self._count)

    def __call__(self) -> float:
        """Run one sample."""
        return self._replay()
