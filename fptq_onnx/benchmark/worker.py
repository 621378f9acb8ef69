"""A process of its own for each model: its memory is its own, and models take turns without sharing a session."""

from __future__ import annotations

__all__ = ["Opened", "ProfiledRuns", "Round", "Worker"]

import contextlib
import multiprocessing
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fptq_onnx.benchmark.memory import GpuMeter, peak_bytes, reset_peak, resident_bytes
from fptq_onnx.benchmark.profile import ProfiledRuns, read_profile
from fptq_onnx.benchmark.results import Case, Kind, MemoryUse, Settings
from fptq_onnx.benchmark.subject import Subject, Timing
from fptq_onnx.errors import FptqError, ModelError
from fptq_onnx.graph.feeds import ModelInputs
from fptq_onnx.runtime import session

_GOODBYE = 5.0
_PROFILED_RUNS = 3
_PROFILED_STEPS = 4


@dataclass(frozen=True)
class Opened:
    """What opening a model took."""

    kind: Kind
    providers: tuple[str, ...]
    load_seconds: float
    memory: MemoryUse


@dataclass(frozen=True)
class Round:
    """One timed run of a case, and the peak memory since the run before."""

    timing: Timing
    memory: MemoryUse


class Worker:
    """The parent's end of a process that runs one model. A context manager: the process ends with the block.

    Args:
        path: The model.
        inputs: Its inputs, read by the parent so that this process never holds the graph.
        library: Whether to register the op library.
        settings: Provider, threads and seed are used.
    """

    def __init__(self, path: Path, inputs: ModelInputs, library: bool, settings: Settings) -> None:
        """Start the process; nothing is opened yet."""
        self._path = path
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, path, inputs, library, settings), name=f"bench {path.name}", daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; at once if the block failed or was interrupted."""
        if kind is None:
            with contextlib.suppress(OSError, ValueError):
                self._connection.send(None)
            self._process.join(timeout=_GOODBYE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def open(self) -> Opened:
        """Open the session.

        Raises:
            FptqError: Whatever opening it raised.
            ModelError: The process ended, such as for lack of memory.
        """
        opened = self._ask("open")
        assert isinstance(opened, Opened)
        return opened

    def run(self, case: Case, vocabulary: int) -> Round:
        """Run one case; raises as `open` does."""
        done = self._ask("run", case, vocabulary)
        assert isinstance(done, Round)
        return done

    def profile(self, case: Case, vocabulary: int) -> ProfiledRuns:
        """Run one case under onnxruntime's profiler, in a second session after the first; raises as `open` does."""
        profiled = self._ask("profile", case, vocabulary)
        assert isinstance(profiled, ProfiledRuns)
        return profiled

    def _ask(self, *request: Any) -> Any:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode or 0
            ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise ModelError(
                str(self._path),
                f"the process that ran it ended {ended}",
                "Look for lack of memory (SIGKILL), or try smaller --batches and --lengths",
            ) from error
        if isinstance(answer, _Failure):
            raise answer.kind(answer.where, answer.reason, answer.fix)
        return answer


@dataclass(frozen=True)
class _Failure:
    """An error of the package on its way to the parent."""

    kind: type[FptqError]
    where: str
    reason: str
    fix: str


class _Bench:
    """The process's end."""

    def __init__(self, path: Path, inputs: ModelInputs, library: bool, settings: Settings) -> None:
        self._path, self._inputs, self._library, self._settings = path, inputs, library, settings
        self._random = np.random.default_rng(settings.seed)
        self._subject: Subject | None = None
        self._meter: GpuMeter | None = None
        self._before = 0

    def open(self) -> Opened:
        import onnxruntime  # the library counts as the process's, not as the model's memory

        onnxruntime.get_available_providers()
        if self._settings.provider == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            with contextlib.suppress(OSError):  # without a driver opening the session says so better
                self._meter = GpuMeter()
        self._before = resident_bytes()
        reset_peak()
        start = time.perf_counter()
        opened = self._session()
        seconds = time.perf_counter() - start
        self._subject = Subject(opened, self._inputs, str(self._path))
        return Opened(self._subject.kind, tuple(opened.get_providers()), seconds, self._memory())

    def run(self, case: Case, vocabulary: int) -> Round:
        assert self._subject is not None
        reset_peak()
        timing = self._subject.run(self._tokens(case, vocabulary), case.new_tokens)
        return Round(timing, self._memory())

    def profile(self, case: Case, vocabulary: int) -> ProfiledRuns:
        self._subject = None  # two sessions at a time could be too much
        token_ids = self._tokens(case, vocabulary)
        with tempfile.TemporaryDirectory(prefix="fptq-onnx-") as folder:
            opened = self._session(Path(folder) / "profile")
            subject = Subject(opened, self._inputs, str(self._path))
            steps = min(case.new_tokens, _PROFILED_STEPS) if subject.kind is Kind.DECODER else 0
            for _ in range(1 + _PROFILED_RUNS):
                subject.run(token_ids, steps)
            written = Path(opened.end_profiling())
            return read_profile(written, runs=_PROFILED_RUNS, steps=steps)

    def _session(self, profile: Path | None = None) -> Any:
        settings = self._settings
        return session(
            self._path, settings.provider, register_library=self._library, threads=settings.threads, profile=profile
        )

    def _tokens(self, case: Case, vocabulary: int) -> npt.NDArray[np.int64]:
        return self._random.integers(0, vocabulary, (case.batch, case.length), np.int64)

    def _memory(self) -> MemoryUse:
        return MemoryUse(peak_bytes(), self._before, None if self._meter is None else self._meter.taken_bytes())


def _serve(connection: Connection, path: Path, inputs: ModelInputs, library: bool, settings: Settings) -> None:
    """Answer requests until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    bench = _Bench(path, inputs, library, settings)
    with contextlib.suppress(EOFError):
        while (request := connection.recv()) is not None:
            try:
                connection.send(getattr(bench, request[0])(*request[1:]))
            except FptqError as error:
                connection.send(_Failure(type(error), error.where, error.reason, error.fix))
