"""A short run of the session fuzzer; `make fuzz` runs the long one, with a sanitized library."""

from __future__ import annotations

import fuzz_sessions
import pytest


def test_random_nodes_never_end_the_process() -> None:
    counts = fuzz_sessions.fuzz(400, seed=20, sanitized=None)
    assert sum(counts.values()) == 400
    assert all(counts[outcome] >= 20 for outcome in fuzz_sessions.OUTCOMES), counts


def test_a_dead_process_names_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPTQ_OPS_LIBRARY", "/proc/self/exe")  # a file, and no library
    with pytest.raises(RuntimeError, match=r"case 3 ended the process with status 1; repeat it with"):
        fuzz_sessions.fuzz(5, seed=20, sanitized=None, start=3)
