"""Progress of long work: one protocol, a rich bar on terminals, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

__all__ = ["Advance", "Progress", "SilentProgress", "TerminalProgress"]

Advance = Callable[[int], None]


class Progress(Protocol):
    """What every long-running function of the package takes to tell how far it is."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a stage of `total` steps (None: unknown); the returned callable advances it by n steps."""
        ...

    def note(self, text: str) -> None:
        """Tell one line that belongs to no stage."""
        ...


class SilentProgress:
    """The default of the Python API: says nothing."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Open a stage nobody watches."""
        yield lambda steps: None

    def note(self, text: str) -> None:
        """Say nothing."""


class TerminalProgress:
    """A bar per stage on a terminal; elsewhere one line when a stage ends, so that logs stay readable."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to `stream` (standard error by default)."""
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show one stage until the block ends."""
        if not self._console.is_terminal:
            yield from self._plain(title)
            return
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ]
        with RichProgress(*columns, console=self._console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda steps: bar.advance(task, steps)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def _plain(self, title: str) -> Iterator[Advance]:
        started = time.monotonic()
        yield lambda steps: None
        print(f"{title}: {time.monotonic() - started:.1f} s", file=self._stream, flush=True)
