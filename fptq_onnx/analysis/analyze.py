"""The protocol as one call: baseline, standard recipe, sensitivity, thresholds, mixed precision, findings, report."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from fptq_onnx.analysis.campaign import Campaign
from fptq_onnx.analysis.diagnosis import diagnose
from fptq_onnx.analysis.evidence import Evidence, known_tokens
from fptq_onnx.analysis.executors import Executor, ProcessExecutor, RayExecutor, SerialExecutor
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.figures import require_matplotlib
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.mixed import Mixed, mix
from fptq_onnx.analysis.page import write_page
from fptq_onnx.analysis.proposal import Proposal, choose, convert_command, recipe_yaml, unseen
from fptq_onnx.analysis.request import Request
from fptq_onnx.analysis.result import Analysis, Group, Model, StudyPoint
from fptq_onnx.analysis.sensitivity import inspect, layer_losses, measure_groups, measure_layers, sensitivities
from fptq_onnx.analysis.speed import CostModel
from fptq_onnx.analysis.study import Study
from fptq_onnx.errors import RecipeError
from fptq_onnx.graph.output_files import refuse_overwriting, writing
from fptq_onnx.progress import Progress, SilentProgress
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Stopwatch, versions
from fptq_onnx.runtime import Provider

__all__ = ["STEPS", "Step", "analyze"]

logger = logging.getLogger(__name__)

Step = Literal["baseline", "quantized", "groups", "layers", "thresholds", "mixed"]
STEPS: tuple[Step, ...] = get_args(Step)

# What is written into the output folder.
_WRITTEN = _PAGE, _FIGURES, _RECIPE = "report.html", "analysis.json", "recipe.yaml"
# Share of the budget for measurements; the rest is for the check on unseen text and the page.
_MEASURING = 0.85
# Of the time that is left when a step begins, the share that it may use; what it leaves goes to the next.
_SHARES = {"groups": 0.25, "layers": 0.5, "thresholds": 0.5, "mixed": 0.6}


def analyze(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] = "paper",
    metric: str | None = None,
    tokens: int = 2000,
    window: int = 512,
    target: float | None = None,
    steps: Sequence[Step] = STEPS,
    minutes: float | None = None,
    jobs: int = 1,
    ray: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    provider: Provider = "cpu",
    progress: Progress | None = None,
) -> Analysis:
    """Find out which layers lose accuracy or speed under a recipe, why, and which recipe does better.

    Args:
        model: Float ONNX model.
        output: Folder for analysis.json, recipe.yaml and report.html; created if missing.
        text: UTF-8 text (or .npz feeds for a model without a tokenizer) that the metric is computed on.
        calibration: Text or .npz to observe activations on; None for random tokens.
        tokenizer: tokenizer.json; the one beside the model by default.
        recipe: The recipe to judge: "paper" is standard FPTQ.
        metric: "kl", "perplexity", "last-word", "cosine", or "module:function" (see `EntryPointMetric`); by default
            "kl" where the model gives logits per token, else "cosine".
        tokens: Tokens of the text to measure on, rounded up to whole windows.
        window: Tokens per window.
        target: Loss that the proposed recipe has to reach; without it the proposal is as good as it gets without
            being slower than `recipe`.
        steps: Steps to run; the others are left out of the result. What a step needs of earlier ones is taken from
            `work_dir`, or measured.
        minutes: Time for everything; the most informative measurements come first, the rest is left out and counted.
        jobs: Processes that measure at once.
        ray: Address of a Ray cluster to measure on ("local" starts one here), with `jobs` actors.
        work_dir: Where measurements are kept: a second call goes on from there. None keeps nothing.
        provider: Where sessions run.
        progress: Told of the stages.

    Returns:
        What was found, as written to analysis.json.

    Raises:
        ModelError: The model is broken or cannot be handled, or `output` cannot be written.
        NothingQuantizedError: It has no linear layer.
        RecipeError: The recipe does not fit, or a step is unknown.
        CalibrationError: The data do not fit the model.
        ModelError: A file in `output` is one that is read, or cannot be written.
        RuntimeUnavailableError: onnxruntime, the provider, the op library, Ray or matplotlib is missing.
    """
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise RecipeError(f"step {unknown.pop()!r}", "it is unknown", f"Use {', '.join(STEPS)}")
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(os.fspath(recipe))
    request = Request(
        Path(model),
        Path(text),
        None if calibration is None else Path(calibration),
        None if tokenizer is None else Path(tokenizer),
        settings,
        metric,
        tokens,
        window,
        provider,
        options=_options(recipe),
    )
    read = (request.model, request.text, request.calibration, request.tokenizer_path(), settings.source)
    refuse_overwriting(
        [Path(output) / name for name in _WRITTEN],
        [path for path in read if path is not None],
        "this is a file that the analysis reads",
    )
    with tempfile.TemporaryDirectory(prefix="fptq-analyze-") as temporary:
        folder = Path(work_dir) if work_dir is not None else Path(temporary)
        return _Analyzer(request, folder, set(steps), target, progress or SilentProgress()).run(
            Path(output), minutes, jobs, ray
        )


def _options(recipe: Recipe | str | os.PathLike[str]) -> tuple[str, ...]:
    """How `convert` is asked for a recipe: its name or path, and the fields in which it differs from that name's."""
    if not isinstance(recipe, Recipe):
        return "--recipe", os.fspath(recipe)
    name = recipe.name if recipe.name in Recipe.names() else "paper"
    words = ["--recipe", name]
    usual = Recipe.load(name).resolved()
    for section, fields in recipe.resolved().items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            if value != usual[section][field]:
                words += ["--set", f"{section}.{field}={json.dumps(value)}"]
    return tuple(words)


class _Analyzer:
    """One analysis: the steps in order, each on what the earlier ones found."""

    def __init__(
        self, request: Request, folder: Path, steps: set[Step], target: float | None, progress: Progress
    ) -> None:
        self._request, self._folder, self._steps = request, folder, steps
        self._target, self._progress = target, progress
        self._watch = Stopwatch()

    def run(self, output: Path, minutes: float | None, jobs: int, ray: str | None) -> Analysis:
        require_matplotlib()  # before the long work
        self._grid: dict[tuple[float, float], StudyPoint] = {}
        with self._watch.stage("load"):
            self._lab = Laboratory(self._request, self._folder, progress=self._progress)
            with writing(output):
                output.mkdir(parents=True, exist_ok=True)
            executor = self._executor(jobs, ray)
        measuring = None if minutes is None else 60 * minutes * _MEASURING
        self._campaign = Campaign(self._lab, executor, measuring, self._progress)
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        try:
            analysis, proposal = self._measure()
        finally:
            executor.close()
        with self._watch.stage("report"), writing(output):
            analysis.skipped, analysis.measurements = self._campaign.skipped, self._campaign.made
            analysis.seconds, analysis.versions = self._watch.seconds, versions()
            if proposal is not None:
                (output / _RECIPE).write_text(recipe_yaml(proposal), encoding="utf-8")
                analysis.proposal["command"] = convert_command(self._lab, output)
            (output / _FIGURES).write_text(analysis.to_json(), encoding="utf-8")
            write_page(output / _PAGE, analysis, self._lab, self._grid)
        return analysis

    def _executor(self, jobs: int, ray: str | None) -> Executor:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        if ray is not None:
            return RayExecutor(self._request, self._folder, ray, jobs, threads)
        return ProcessExecutor(self._request, self._folder, jobs) if jobs > 1 else SerialExecutor(self._lab)

    def _measure(self) -> tuple[Analysis, Proposal | None]:
        lab, watch = self._lab, self._watch
        with watch.stage("baseline"):
            baseline = lab.baseline
        analysis = Analysis(
            model=str(self._request.model),
            recipe=self._request.recipe.name,
            metric={"name": lab.metric.name, "unit": lab.metric.unit, "loss_unit": lab.metric.loss_unit},
            data=self._data(),
            baseline=Model(baseline[lab.metric.name], 0.0, baseline),
        )
        if self._steps <= {"baseline"}:
            return analysis, None
        subject = lab.subject(Experiment())
        with watch.stage("quantized"):
            whole = self._campaign.one(Experiment(), "Measuring the recipe")
            costs = CostModel(subject, lab.batches[0], lab.open_session)
            kernels = costs.learn(subject, every_segment=True)
            self._price(analysis, whole, costs)
        if not self._steps & {"groups", "layers", "thresholds", "mixed"}:
            return analysis, None
        with watch.stage("inspect"):
            inspections = inspect(self._campaign, subject, self._progress)
        groups: list[Group] = []
        if self._steps & {"groups", "layers", "mixed"}:
            with watch.stage("groups"):
                groups = measure_groups(self._campaign, subject, self._until("groups"))
        if self._steps & {"layers", "mixed"}:
            with watch.stage("layers"):
                measure_layers(self._campaign, subject, groups, inspections, self._until("layers"))
        losses = layer_losses(self._campaign, subject)
        names = {kernel.node: f"{kernel.op} on {kernel.provider}" for kernel in kernels}
        analysis.groups = groups
        analysis.sensitivity = sensitivities(subject, losses, inspections, names)
        study, mixed = self._improve(analysis, costs, losses, whole)
        with watch.stage("diagnose"):
            evidence = Evidence(
                self._campaign,
                lab.subject(Experiment()),
                whole,
                analysis.sensitivity,
                inspections,
                lab.planned(Experiment(ranges="evaluation")),
                known_tokens(lab),
                costs,
                kernels,
                study,
                mixed,
            )
            analysis.findings = diagnose(evidence)
        best = whole if study is None else self._campaign.one(study.best, "Measuring the best recipe")
        proposal = choose(lab, costs, whole, study, mixed, self._target, best)
        with watch.stage("unseen text"):
            analysis.proposal = self._describe(proposal, costs)
        if study is not None:
            analysis.thresholds = study.points
            self._grid = {pair: study.points[index] for pair, index in study.grid.items()}
        return analysis, proposal

    def _improve(
        self, analysis: Analysis, costs: CostModel, losses: dict[str, float], whole: Measurement
    ) -> tuple[Study | None, Mixed | None]:
        study = mixed = None
        if self._steps & {"thresholds", "mixed"}:
            study = Study(self._campaign, costs)
            study.start(whole)
        if study is not None and "thresholds" in self._steps:
            with self._watch.stage("thresholds"):
                study.thresholds(self._until("thresholds"))
                study.granularity(self._until("thresholds"))
        if study is not None and "mixed" in self._steps:
            with self._watch.stage("mixed"):
                best = self._campaign.one(study.best, "Measuring the best recipe")
                mixed = mix(self._campaign, study, costs, losses, best, self._target, self._until("mixed"))
        if study is not None and mixed is not None:
            for kept, measured in ((mixed.layers, mixed.measured), (mixed.free, mixed.free_measured)):
                if kept and measured is not None:
                    study.with_float(study.best, kept, measured)
            analysis.mixed = {
                "target": mixed.target,
                "reached": mixed.reached,
                "layers": list(mixed.layers),
                "loss": mixed.measured.loss,
                "layers_at_equal_speed": list(mixed.free),
                "loss_at_equal_speed": None if mixed.free_measured is None else mixed.free_measured.loss,
            }
        return study, mixed

    @property
    def _in_time(self) -> bool:
        """Whether the whole budget is not over yet."""
        return self._end is None or time.monotonic() < self._end

    def _until(self, step: str) -> float | None:
        return self._campaign.until(_SHARES[step])

    def _price(self, analysis: Analysis, whole: Measurement, costs: CostModel) -> None:
        subject = self._lab.subject(Experiment())
        slow, fast = costs.float_seconds(subject), costs.seconds(subject)
        analysis.baseline.seconds_per_batch, analysis.baseline.speedup = slow, 1.0
        analysis.quantized = Model(
            whole.figures[self._lab.metric.name], whole.loss, whole.figures, fast, slow / fast if fast else None
        )

    def _describe(self, proposal: Proposal, costs: CostModel) -> dict[str, Any]:
        slow = costs.float_seconds(self._lab.subject(Experiment()))
        return {
            "recipe": proposal.recipe.name,
            "reason": proposal.reason,
            "changes": proposal.changes,
            "kept_float": list(proposal.kept_float),
            "loss": proposal.measured.loss,
            "figures": proposal.measured.figures,
            "seconds_per_batch": proposal.seconds,
            "speedup": slow / proposal.seconds if proposal.seconds else None,
            "unseen": unseen(self._lab, proposal) if self._in_time else None,
        }

    def _data(self) -> dict[str, Any]:
        tokens = self._lab.evaluation_tokens()
        request = self._request
        return {
            "text": str(request.text),
            "calibration": "random tokens (data-free)" if request.calibration is None else str(request.calibration),
            "tokens": None if tokens is None else int(tokens.size),
            "sequences": len(self._lab.batches),
        }
