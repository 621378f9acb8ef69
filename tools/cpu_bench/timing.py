"""Interleaved timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ["CLOCK", "clock_for", "measure"]

CLOCK = "processor time of the process with one thread, wall time with more"


def clock_for(threads: int) -> Callable[[], float]:
    """The clock for so many threads, see `CLOCK`: with one, whatever else the machine does is not counted."""
    return time.process_time if threads == 1 else time.perf_counter


def measure(timers: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Interleave the contenders.

    Args:
        timers: For each contender a function that runs it once and returns its seconds.
        rounds: Rounds; each contender runs in each.
        seconds: Time for each contender in all rounds together, at least one call per round.

    Returns:
        For each contender the median over rounds of the round's median, and the fastest and slowest round, in ms.
    """
    calls = {name: max(1, int(seconds / rounds / min(timer() for _ in range(3)))) for name, timer in timers.items()}
    rounds_of: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            rounds_of[name].append(statistics.median(timer() for _ in range(min(calls[name], 200))) * 1e3)
    return {
        name: {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
        for name, values in rounds_of.items()
    }
