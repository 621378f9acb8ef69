"""Measures experiments on one loaded model."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.analysis.experiments import Experiment, Measurement, Ranges
from fptq_onnx.analysis.metrics import Metric
from fptq_onnx.analysis.request import Request, open_metric
from fptq_onnx.analysis.store import Store
from fptq_onnx.analysis.subject import Planned, StoredCalibration, Subject, WeightCache, materialize, plan_model
from fptq_onnx.calibration.data import calibration_data
from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.errors import CalibrationError, NothingQuantizedError
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.opset import ensure_opset
from fptq_onnx.ops import get_library_path
from fptq_onnx.progress import Progress, SilentProgress
from fptq_onnx.quantizing import rotate
from fptq_onnx.recipe import Recipe
from fptq_onnx.runtime import PROVIDERS, check_provider

__all__ = ["Laboratory"]

# The recipe that was asked for, and the one that a study is at.
_KEPT_SUBJECTS = 2


class Laboratory:
    """One process's share of an analysis: the loaded model, its float states, and the recipes at work.

    Args:
        request: What to analyze.
        folder: Where statistics, weights and measurements lie; the processes of one analysis share it.
        threads: Intra-op threads of sessions, None for onnxruntime's choice.
        progress: Told of passes over the calibration data.

    Raises:
        ModelError: The model is broken.
        NothingQuantizedError: It has no linear layer.
        CalibrationError: The data do not fit the model.
        RuntimeUnavailableError: onnxruntime, the provider or the op library is missing.
    """

    def __init__(
        self, request: Request, folder: Path, *, threads: int | None = None, progress: Progress | None = None
    ) -> None:
        """Load the model and open the data; nothing runs yet."""
        check_provider(request.provider, register_library=True)
        self.request, self._threads, self._progress = request, threads, progress or SilentProgress()
        self._source = load_model(request.model)
        ensure_opset(self._source)
        if not find_linears(self._source).layers:
            raise NothingQuantizedError(
                str(request.model), "it has no linear layer with a constant weight", "Analyze the float model"
            )
        self.store = Store(folder / request.fingerprint(self._source))
        self.metric, self.batches = open_metric(request, self._source)
        self._weights = WeightCache()
        self._rotated: dict[str, ir.Model] = {}
        self._calibrations: dict[str, StoredCalibration] = {}
        self._subjects: OrderedDict[str, Subject] = OrderedDict()
        self._baseline: dict[str, float] | None = None

    @property
    def baseline(self) -> dict[str, float]:
        """Figures of the float model; evaluated on first use, which also gives the metric its reference."""
        if self._baseline is None:
            chain = self.subject(Experiment()).chain
            self._baseline = self.metric.evaluate(chain.run)
        return self._baseline

    def measure(self, experiment: Experiment) -> Measurement:
        """Run an experiment.

        Raises:
            CalibrationError: The metric gave something that is not a number.
        """
        baseline = self.baseline
        started = time.monotonic()
        subject = self.subject(experiment)
        names = subject.names(experiment.layers)
        figures = self.metric.evaluate(lambda feeds: subject.chain.run(feeds, names))
        loss = self.metric.loss(figures, baseline)
        if loss != loss:
            raise CalibrationError(f"metric {self.metric.name}", "gave NaN", "Check the model in float32")
        return Measurement(loss, figures, round(time.monotonic() - started, 3))

    def recipe(self, experiment: Experiment) -> Recipe:
        """The recipe of an experiment."""
        return self.request.recipe.with_overrides(experiment.changes)

    def planned(self, experiment: Experiment) -> Planned:
        """The decisions of an experiment's recipe, without carrying them out."""
        recipe = self.recipe(experiment)
        calibration, context = self._calibration(recipe, experiment.ranges)
        return plan_model(self._model(recipe), recipe, calibration, context)

    def subject(self, experiment: Experiment) -> Subject:
        """The model under the recipe of an experiment; which of its layers are quantized is up to the caller."""
        key = Experiment(None, experiment.overrides, experiment.ranges).key
        if key not in self._subjects:
            recipe = self.recipe(experiment)
            calibration, context = self._calibration(recipe, experiment.ranges)
            model = self._model(recipe).clone()
            planned = plan_model(model, recipe, calibration, context)
            self._subjects[key] = Subject(
                model, planned, recipe, calibration, context, self._weights, self.open_session, self._progress
            )
            evictable = [kept for kept in self._subjects if kept != Experiment().key]
            for kept in evictable[: max(0, len(self._subjects) - _KEPT_SUBJECTS)]:
                del self._subjects[kept]
        self._subjects.move_to_end(key)
        return self._subjects[key]

    def evaluation_tokens(self) -> npt.NDArray[np.int64] | None:
        """Distinct and repeated token ids of the evaluation data, flat; None if the model takes no token ids."""
        name = self._token_input()
        return None if name is None else np.concatenate([batch[name].ravel() for batch in self.batches])

    def calibration_tokens(self) -> npt.NDArray[np.int64] | None:
        """Token ids that calibration uses, flat; None if the model takes no token ids."""
        name = self._token_input()
        if name is None:
            return None
        settings = self.request.recipe.calibration
        data = calibration_data(
            self.request.calibration,
            describe_inputs(self._source),
            tokenizer=self.request.tokenizer_path(),
            windows=settings.windows,
            length=settings.length,
            seed=settings.seed,
        )
        return np.concatenate([np.asarray(batch[name]).ravel() for batch in data])

    def _token_input(self) -> str | None:
        token_input = describe_inputs(self._source).token_input
        return None if token_input is None else token_input.name

    def unseen_metric(self) -> Metric | None:
        """The metric on as much of the text again, behind what `metric` reads; None where there is not that much."""
        if self.request.text.suffix == ".npz" or ":" in self.metric.name:
            return None
        try:
            metric, batches = open_metric(dataclasses.replace(self.request, skip=len(self.batches)), self._source)
        except CalibrationError:  # nothing is left of the text
            return None
        return metric if len(batches) >= len(self.batches) else None

    def open_session(self, model: ir.Model, *, profile: Path | None = None) -> Any:
        """A session of a model in memory, with the op library registered."""

        def configure(options: Any) -> None:
            options.register_custom_ops_library(str(get_library_path()))
            options.enable_cpu_mem_arena = False  # one for each of a hundred small sessions would add up to gigabytes
            if profile is not None:
                options.enable_profiling = True
                options.profile_file_prefix = os.fspath(profile)

        providers = PROVIDERS[self.request.provider]
        return memory_session(model, providers, threads=self._threads, configure=configure)

    def _model(self, recipe: Recipe) -> ir.Model:
        """The float model, rotated as the recipe says."""
        rotation = recipe.rotation
        if not (rotation.residual or rotation.heads):
            return self._source
        key = f"{rotation.model_dump_json()} {recipe.calibration.seed}"
        if key not in self._rotated:
            model = self._source.clone()
            rotate(model, recipe)
            materialize(model)
            self._rotated = {key: model}
        return self._rotated[key]

    def _calibration(self, recipe: Recipe, ranges: Ranges) -> tuple[StoredCalibration, tuple[object, ...]]:
        """The data to observe on, opened once per way of reading them, and the context of its statistics."""
        context = (
            ranges,
            recipe.calibration.model_dump(mode="json"),
            recipe.rotation.model_dump(mode="json"),
            recipe.activations.leading_tokens,
        )
        # What the recipe asks of the data (samples, a second pass) is part of how they are opened.
        key = repr((context, recipe.activations.static_range, recipe.weights.needs_moments, recipe.needs_samples))
        if key not in self._calibrations:
            source: Any = self.batches if ranges == "evaluation" else self.request.calibration
            calibration = StoredCalibration(
                source,
                self.request.model,
                self.request.tokenizer,
                recipe,
                threads=self._threads,
                providers=PROVIDERS[self.request.provider],
                progress=self._progress,
            )
            calibration.store = self.store
            calibration.open(self._source)
            self._calibrations[key] = calibration
        return self._calibrations[key], context
