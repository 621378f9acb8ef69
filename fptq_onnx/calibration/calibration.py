"""The calibration of one conversion: opens the data, observes a model as often as asked, keeps a sample for later."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.data import CalibrationData, calibration_data
from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.moments import SecondMomentObserver, SplitMoments, passes_within
from fptq_onnx.calibration.runner import calibrate, observe
from fptq_onnx.calibration.tokens import find_tokenizer
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.progress import Progress
from fptq_onnx.quantization.statistics import ActivationStatistics
from fptq_onnx.recipe import Recipe

__all__ = ["Batch", "Calibration"]

Batch = Mapping[str, npt.NDArray[Any]]


class Calibration:
    """Data and settings of one conversion.

    Args:
        source: What `calibration_data` opens: a text or .npz path, a reader, an iterable of feeds, or None.
        model_path: Where the model came from; a tokenizer.json beside it reads a text.
        tokenizer: Another tokenizer.
        recipe: Windows, length, seed, and the leading tokens to leave out.
        sample_tokens: Tokens to keep for the verification.
        providers: Execution providers.
        progress: Told of each batch.

    Attributes:
        data: The data in use, once a model was observed.
        sample: The first batches, as fed.
    """

    def __init__(
        self,
        source: Any,
        model_path: Path,
        tokenizer: str | os.PathLike[str] | None,
        recipe: Recipe,
        *,
        sample_tokens: int,
        providers: Sequence[str],
        progress: Progress,
    ) -> None:
        """Open nothing yet."""
        self._source = source
        self._tokenizer = tokenizer or find_tokenizer(model_path)
        self._recipe = recipe
        self._sample_tokens = sample_tokens
        self._providers = providers
        self._progress = progress
        self.data: CalibrationData | None = None
        self.sample: list[Batch] = []

    def observe(self, model: ir.Model, activations: Sequence[str]) -> dict[str, ActivationStatistics]:
        """Statistics of activations by name; leading tokens are left out as the recipe says.

        Raises:
            CalibrationError: The data are missing, empty or do not fit the model.
        """
        observed = calibrate(
            model,
            activations,
            self._batches(model),
            leading_tokens=self._recipe.activations.leading_tokens,
            providers=self._providers,
            progress=self._progress,
        )
        return {name: activation.rest for name, activation in observed.items()}

    def moments(
        self, model: ir.Model, channels: Mapping[str, int], caps: Mapping[str, float]
    ) -> dict[str, SplitMoments]:
        """Second moments of activations by name, in as many passes over the data as the recipe's memory demands.

        Args:
            model: The model that the weights to be quantized belong to.
            channels: Activation name -> K.
            caps: Activation name -> the largest magnitude at which a token still counts fully.

        Raises:
            CalibrationError: As for `observe`.
        """
        found: dict[str, SplitMoments] = {}
        for names in passes_within(channels, int(self._recipe.calibration.moments_gib * 2**30)):
            observers = [SecondMomentObserver(name, channels[name], caps[name]) for name in names]
            observe(
                model,
                observers,
                self._batches(model),
                session_factory=lambda copy: memory_session(copy, self._providers),
                progress=self._progress,
            )
            found |= {name: observer.moments for name, observer in zip(names, observers, strict=True)}
        return found

    def _batches(self, model: ir.Model) -> _Tee:
        """The data once more; opened when the first model asks."""
        if self.data is None:
            self.data = calibration_data(
                self._source,
                describe_inputs(model),
                tokenizer=self._tokenizer,
                windows=self._recipe.calibration.windows,
                length=self._recipe.calibration.length,
                seed=self._recipe.calibration.seed,
            )
            if isinstance(self.data.batches, Iterator) and self._reads_twice:
                self.data = dataclasses.replace(self.data, batches=list(self.data.batches))
        return _Tee(self.data, self.sample, 0 if self.sample else self._sample_tokens)

    @property
    def _reads_twice(self) -> bool:
        """Whether the equalized model is observed too, so that data which come only once must be kept."""
        return self._recipe.activations.static_range != "absmax" or self._recipe.weights.needs_moments


class _Tee(Iterable[Batch]):
    """Passes batches on and keeps the first of them."""

    def __init__(self, data: CalibrationData, kept: list[Batch], tokens: int) -> None:
        self._data, self._kept, self._tokens = data, kept, tokens

    def __length_hint__(self) -> int:
        return self._data.count or 0

    def __iter__(self) -> Iterator[Batch]:
        missing = self._tokens
        for batch in self._data:
            if missing > 0:
                self._kept.append(batch)
                missing -= max(int(np.prod(array.shape[:2])) for array in batch.values())
            yield batch
