"""Where experiments run: in this process, in several on this machine, or on a Ray cluster; the results are the same."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.request import Request
from fptq_onnx.errors import RuntimeUnavailableError

__all__ = ["Executor", "ProcessExecutor", "RayExecutor", "SerialExecutor"]

Result = tuple[Experiment, Measurement]


class Executor(Protocol):
    """Runs independent experiments."""

    def run(self, experiments: Iterable[Experiment]) -> Iterator[Result]:
        """Measure experiments, begun in the order given and yielded as they finish.

        `experiments` is read only as fast as experiments begin, so that a source may stop when time is up.
        """
        ...

    def close(self) -> None:
        """End all processes."""
        ...


class SerialExecutor:
    """One after another, each with all cores, on a laboratory that the caller uses too."""

    def __init__(self, laboratory: Laboratory) -> None:
        """Use this laboratory."""
        self._laboratory = laboratory

    def run(self, experiments: Iterable[Experiment]) -> Iterator[Result]:
        """Measure experiments in order."""
        for experiment in experiments:
            yield experiment, self._laboratory.measure(experiment)

    def close(self) -> None:
        """Nothing to end."""


class ProcessExecutor:
    """Several processes on this machine, which share its cores. Each loads the model once.

    Args:
        request: What to analyze.
        folder: The analysis' work directory, with statistics stored by the parent.
        jobs: Number of processes.
    """

    def __init__(self, request: Request, folder: Path, jobs: int) -> None:
        """Start the processes; each loads the model when its first experiment comes."""
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self._jobs = jobs
        self._pool = ProcessPoolExecutor(
            jobs,
            # A forked child would inherit onnxruntime's threads, which do not survive a fork.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(request, folder, threads),
        )

    def run(self, experiments: Iterable[Experiment]) -> Iterator[Result]:
        """Measure experiments, as many at a time as there are processes.

        Raises:
            RuntimeUnavailableError: A process was killed, as the system does when memory runs out.
        """
        source = iter(experiments)
        pending: dict[Future[Measurement], Experiment] = {}
        try:
            while True:
                for experiment in islice(source, self._jobs - len(pending)):
                    pending[self._pool.submit(_measure, experiment)] = experiment
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise _killed("a measuring process") from error
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the processes, experiments that have begun first."""
        self._pool.shutdown(cancel_futures=True)


class RayExecutor:
    """Actors on a Ray cluster whose machines see the model, the data and the work directory under the same paths.

    Args:
        request: What to analyze.
        folder: The analysis' work directory.
        address: Of the cluster, as `ray.init` takes it; "local" starts one on this machine.
        jobs: Number of actors.
        threads: Intra-op threads of each actor, which are also the CPUs it reserves.

    Raises:
        RuntimeUnavailableError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, request: Request, folder: Path, address: str, jobs: int, threads: int) -> None:
        """Connect and start the actors."""
        try:
            import ray
        except ImportError:
            raise RuntimeUnavailableError("ray", "is not installed", "Install fptq-onnx[ray]") from None
        self._ray: Any = ray
        local: dict[str, Any] = {"num_cpus": jobs * threads, "include_dashboard": False} if address == "local" else {}
        try:
            # Workers import what this process imports, from the same places.
            self._ray.init(
                address=address,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
                **local,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RuntimeUnavailableError(
                f"ray at {address}", f"cannot be reached ({error})", "Check the address"
            ) from (error)
        actor = self._ray.remote(num_cpus=threads)(Laboratory)
        self._actors = [actor.remote(request, folder, threads=threads) for _ in range(jobs)]

    def run(self, experiments: Iterable[Experiment]) -> Iterator[Result]:
        """Measure experiments, one at a time on each actor.

        Raises:
            RuntimeUnavailableError: An actor was killed, as Ray does when memory runs out.
        """
        source = iter(experiments)
        idle = list(self._actors)
        pending: dict[Any, tuple[Experiment, Any]] = {}
        while True:
            for experiment in islice(source, len(idle)):
                actor = idle.pop()
                pending[actor.measure.remote(experiment)] = experiment, actor
            if not pending:
                return
            done, _ = self._ray.wait(list(pending), num_returns=1)
            for reference in done:
                experiment, actor = pending.pop(reference)
                idle.append(actor)
                yield experiment, _unwrapped(self._ray, reference)

    def close(self) -> None:
        """End the actors and leave the cluster."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


def _unwrapped(ray: Any, reference: Any) -> Measurement:
    """The result, or the error of the package that the actor met."""
    try:
        measurement: Measurement = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise _killed("a Ray actor") from error
    return measurement


def _killed(worker: str) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        worker, "it was killed, most likely because memory ran out", "Repeat the command with fewer --jobs"
    )


_worker: Callable[[], Laboratory] | None = None


def _start_worker(request: Request, folder: Path, threads: int) -> None:
    """Remember what to load; loading here would hide its errors behind a broken pool."""
    global _worker
    loaded: list[Laboratory] = []

    def laboratory() -> Laboratory:
        if not loaded:
            loaded.append(Laboratory(request, folder, threads=threads))
        return loaded[0]

    _worker = laboratory


def _measure(experiment: Experiment) -> Measurement:
    assert _worker is not None
    return _worker().measure(experiment)
