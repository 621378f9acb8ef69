"""The calibration of one conversion: opens the data, and carries them through a model as often as asked."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.data import CalibrationData, calibration_data
from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.observers import StatisticsObserver, TokenGroup
from fptq_onnx.calibration.samples import SampleObserver, sample_stride
from fptq_onnx.calibration.tokens import find_tokenizer
from fptq_onnx.calibration.walk import Walk
from fptq_onnx.errors import CalibrationError, StoppedError
from fptq_onnx.graph.feeds import ModelInputs, describe_inputs
from fptq_onnx.graph.segments import Segment, Segmentation
from fptq_onnx.progress import Progress
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe
from fptq_onnx.storage.states import States
from fptq_onnx.storage.work_dir import WorkDir

__all__ = ["Batch", "Calibration"]

logger = logging.getLogger(__name__)

Batch = Mapping[str, npt.NDArray[Any]]


class Calibration:
    """Data and settings of one conversion.

    Args:
        source: What `calibration_data` opens: a text or .npz path, a reader, an iterable of feeds, or None. The data
            are read once per segment of the model, so what can be read only once is kept in memory.
        model_path: Where the model came from; a tokenizer.json beside it reads a text.
        tokenizer: Another tokenizer.
        recipe: Windows, length, seed, and the leading tokens to leave out.
        providers: Execution providers.
        threads: Intra-op threads, onnxruntime's choice if None.
        moments_bytes: Memory for second moments; what does not fit is observed in further passes through a segment.
        progress: Told of each batch.
        stop: Asked after each segment whether to stop there.

    Attributes:
        data: The data in use, once `open` was called.
        moments_bytes: As given.
        work: Where finished segments are kept; None keeps them in memory.
        seconds: By label of the segment and name of the stage, what it took, in this process or an earlier one.
    """

    def __init__(
        self,
        source: Any,
        model_path: Path,
        tokenizer: str | os.PathLike[str] | None,
        recipe: Recipe,
        *,
        providers: Sequence[str],
        threads: int | None = None,
        moments_bytes: int = 2 << 30,
        progress: Progress,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Open nothing yet."""
        self._source = source
        self._model_path = model_path
        self._tokenizer = tokenizer or find_tokenizer(model_path)
        self._recipe = recipe
        self._providers = providers
        self._threads = threads
        self.moments_bytes = moments_bytes
        self._progress = progress
        self._stop = stop
        self._inputs = ModelInputs(())
        self.data: CalibrationData | None = None
        self.work: WorkDir | None = None
        self.samples: dict[str, npt.NDArray[np.float32]] = {}
        self.seconds: dict[str, dict[str, float]] = {}

    def open(self, model: ir.Model) -> None:
        """Open the data for a model.

        Raises:
            CalibrationError: The data are missing, empty or do not fit the model.
        """
        self._inputs = describe_inputs(model)
        data = calibration_data(
            self._source,
            self._inputs,
            tokenizer=self._tokenizer,
            windows=self._recipe.calibration.windows,
            length=self._recipe.calibration.length,
            seed=self._recipe.calibration.seed,
        )
        if isinstance(data.batches, Iterator):
            data = dataclasses.replace(data, batches=list(data.batches))
        self.data = data

    @property
    def opened(self) -> CalibrationData:
        """The data; a ValueError before `open`."""
        if self.data is None:
            raise ValueError("the calibration data were not opened")
        return self.data

    def fingerprint(self) -> str:
        """SHA-256 of every array of every batch, by name, type and shape."""
        digest = hashlib.sha256()
        for batch in self.opened:
            if not isinstance(batch, Mapping):
                break  # completing the feeds says what is wrong with it
            for name, array in sorted(batch.items()):
                digest.update(f"{name} {np.asarray(array).dtype} {np.shape(array)};".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def size(self) -> tuple[int, int]:
        """Number of batches, and of tokens with padding."""
        sizes = [_tokens(batch) for batch in self.opened if isinstance(batch, Mapping)]
        return len(sizes), sum(sizes)

    def sample(self, tokens: int) -> list[Batch]:
        """The first batches, as many as hold `tokens` tokens."""
        kept: list[Batch] = []
        for batch in self.opened:
            if tokens <= 0:
                break
            kept.append(batch)
            tokens -= _tokens(batch)
        return kept

    def observe(
        self, model: ir.Model, segments: Segmentation, activations: Mapping[str, int]
    ) -> dict[str, ActivationStatistics]:
        """Statistics of activations by name; leading tokens are left out as the recipe says.

        Args:
            model: The float model.
            segments: How it is cut.
            activations: Name -> index of the segment that reads it.

        Raises:
            CalibrationError: The data are missing, empty or do not fit the model.
            StoppedError: It was asked to stop.
        """
        found: dict[str, ActivationStatistics] = {}
        last = max(activations.values(), default=0)
        walk = self.walk(model, segments, "statistics", last)
        with self._progress.stage("Calibrating", self.steps(last + 1)) as advance:
            for segment in segments.segments[: last + 1]:
                record = f"statistics.{segment.index:04d}"
                names = [name for name, index in activations.items() if index == segment.index]
                restored = self.work is not None and self.work.has(record)
                begun = time.monotonic()
                if self.work is not None and restored:
                    arrays, notes = self.work.load(record)
                    self.took(segment, "calibrate", notes["seconds"])
                    advance(self.steps(1))
                else:
                    observers = {name: self.observer(name) for name in names}
                    samplers = self._samplers(names)
                    walk.run(segment, [*observers.values(), *samplers], advance)
                    arrays = {
                        f"{number}.{field}": array
                        for number, observer in enumerate(observers.values())
                        for field, array in observer.statistics.to_dict().items()
                    }
                    arrays |= {f"{number}.sample": sampler.sample for number, sampler in enumerate(samplers)}
                    seconds = self.took(segment, "calibrate", time.monotonic() - begun)
                    if self.work is not None:
                        self.work.save(record, arrays, {"seconds": seconds})
                walk.done(segment)
                for number, name in enumerate(names):
                    fields = {k.partition(".")[2]: v for k, v in arrays.items() if k.partition(".")[0] == str(number)}
                    found[name] = _some_tokens(name, ActivationStatistics.from_dict(fields))
                    if "sample" in fields:
                        self.samples[name] = fields["sample"]
                if not restored:
                    self.stop_if_asked(f"calibrating, {segment.label}")
        logger.info("observed %d activations over %d batches, %d tokens", len(found), *self.size())
        return found

    def observer(self, name: str) -> StatisticsObserver:
        """A fresh observer of an activation, of the tokens that the recipe lets count."""
        return StatisticsObserver(name, self._counted)

    @property
    def emphasizes_first_tokens(self) -> bool:
        """Whether the recipe wants the first tokens to count more, and the model takes token ids to tell them by."""
        return self._recipe.weights.first_token_weight > 1 and self._inputs.token_input is not None

    @property
    def _counted(self) -> TokenGroup:
        return TokenGroup.REST if self._recipe.activations.leading_tokens else TokenGroup.ALL

    def _samplers(self, names: Sequence[str]) -> list[SampleObserver]:
        """Observers of a sample of each activation, if the recipe chooses by output errors."""
        if not self._recipe.needs_samples:
            return []
        stride = sample_stride(self._recipe.calibration.sample_tokens, *self.size())
        return [SampleObserver(name, stride, self._counted) for name in names]

    def walk(self, model: ir.Model, segments: Segmentation, phase: str, last: int) -> Walk:
        """A pass of the data through a model, whose states belong to `phase`."""
        return Walk(
            model,
            segments,
            self._inputs,
            self.opened,
            States(self.work, phase),
            leading_tokens=self._recipe.activations.leading_tokens or int(self.emphasizes_first_tokens),
            session_factory=lambda copy: memory_session(
                copy, self._providers, threads=self._threads, where=str(self._model_path)
            ),
            last=last,
        )

    def steps(self, segments: int) -> int:
        """What a progress bar counts for some segments: batches."""
        return segments * max(1, self.opened.count or 1)

    def took(self, segment: Segment, stage: str, seconds: float) -> float:
        """Note what a stage of a segment took; the seconds, rounded as in reports."""
        rounded = round(seconds, 3)
        self.seconds.setdefault(segment.label, {})[stage] = rounded
        logger.info("%s: %s in %.1f s", segment.label, stage, rounded)
        return rounded

    def stop_if_asked(self, where: str) -> None:
        """Raise StoppedError if somebody asked to stop and the work can be taken up again."""
        if self.work is not None and self._stop():
            raise StoppedError(
                f"stopped after {where}",
                f"finished work lies in {self.work.path}",
                "Run the same command again to go on",
            )


def _some_tokens(name: str, seen: ActivationStatistics) -> ActivationStatistics:
    if seen.tokens == 0:
        raise CalibrationError(
            f"activation {name}",
            "no token of the data counts: all are among the leading tokens",
            "Lower activations.leading_tokens, or calibrate on longer sequences",
        )
    return seen


def _tokens(batch: Batch) -> int:
    """Most [B, S] positions of any array; 0 for what is no set of feeds, of which its reader complains."""
    arrays = batch.values() if isinstance(batch, Mapping) else ()
    return max((int(np.prod(np.shape(array)[:2])) for array in arrays), default=0)
