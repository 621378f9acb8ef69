"""The recipe to use instead: the best that was measured, as a file for `convert --recipe`, checked on unseen text."""

from __future__ import annotations

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fptq_onnx.analysis.evidence import label_patterns
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.mixed import Mixed
from fptq_onnx.analysis.speed import CostModel
from fptq_onnx.analysis.study import Study
from fptq_onnx.recipe import Recipe

__all__ = ["Proposal", "choose", "convert_command", "recipe_yaml", "unseen"]


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The recipe to use.

    Attributes:
        recipe: It.
        experiment: As it was measured.
        changes: Fields that differ from the recipe that was asked for.
        kept_float: Labels of the layers that stay float on top of that recipe's.
        measured: On the text of the analysis.
        seconds: Sum of kernel times of the first batch.
        reason: Why this one.
    """

    recipe: Recipe
    experiment: Experiment
    changes: dict[str, Any]
    kept_float: tuple[str, ...]
    measured: Measurement
    seconds: float
    reason: str


def choose(
    laboratory: Laboratory,
    costs: CostModel,
    whole: Measurement,
    study: Study | None,
    mixed: Mixed | None,
    target: float | None,
    best: Measurement,
) -> Proposal:
    """The best recipe that is no slower than the one asked for; with a target, one that reaches it whatever its time.

    Args:
        laboratory: Where it was measured.
        costs: Prices.
        whole: The recipe that was asked for.
        study: Step 4, if it ran.
        mixed: Step 5, if it ran.
        target: Loss to reach, None for no loss of speed.
        best: The best recipe of the study (`whole` without one).
    """
    experiment = study.best if study is not None else Experiment()
    kept: tuple[str, ...] = ()
    measured, reason = best, "the most accurate recipe of the study that is no slower than the recipe asked for"
    if mixed is not None and target is not None and best.loss > target:
        kept, measured = mixed.layers, mixed.measured
        reason = (
            f"the shortest list of float layers that {'reaches' if mixed.reached else 'comes nearest to'} {target:g}"
        )
    elif mixed is not None and mixed.free_measured is not None and mixed.free_measured.loss < best.loss:
        kept, measured = mixed.free, mixed.free_measured
        reason = (
            "the best recipe of the study, with as many layers float as leave it no slower than the recipe asked for"
        )
    elif measured.loss >= whole.loss and experiment == Experiment():
        reason = "nothing better was found: the recipe that was asked for"
    changes = experiment.changes
    subject = laboratory.subject(experiment)
    exclude = [*subject.recipe.layers.exclude, *label_patterns(kept)]
    recipe = subject.recipe.with_overrides(
        {
            "layers.exclude": exclude,
            "name": f"{laboratory.request.recipe.name}-analyzed",
            "description": f"Proposed by fptq-onnx analyze for {laboratory.request.model.name}: {reason}.",
        }
    )
    labels = [label for label in subject.layers if subject.names((label,)) and label not in kept]
    return Proposal(
        recipe,
        dataclasses.replace(experiment, layers=tuple(labels) if kept else None),
        changes,
        kept,
        measured,
        costs.seconds(subject, kept),
        reason,
    )


def unseen(laboratory: Laboratory, proposal: Proposal) -> dict[str, Any] | None:
    """Figures of the float model, the recipe asked for and the proposal on the text behind what was analyzed.

    Returns:
        None where the text is too short or the data are samples without an order.
    """
    metric = laboratory.unseen_metric()
    if metric is None:
        return None
    float_chain = laboratory.subject(Experiment()).chain
    baseline = metric.evaluate(float_chain.run)
    result: dict[str, Any] = {"float": baseline}
    for name, experiment in (("recipe", Experiment()), ("proposal", proposal.experiment)):
        subject = laboratory.subject(experiment)
        names = subject.names(experiment.layers)
        figures = metric.evaluate(partial(subject.chain.run, quantized=names))
        result[name] = figures | {"loss": metric.loss(figures, baseline)}
    return result


def recipe_yaml(proposal: Proposal) -> str:
    """The recipe as YAML, every field with its value."""
    header = (
        "# Written by fptq-onnx analyze. Use it with: fptq-onnx convert MODEL --recipe recipe.yaml\n"
        f"# {proposal.reason[0].upper()}{proposal.reason[1:]}.\n"
    )
    return header + yaml.safe_dump(proposal.recipe.resolved(), sort_keys=False, allow_unicode=True, width=100)


def convert_command(laboratory: Laboratory, folder: Path) -> str:
    """The command that uses the proposal."""
    request = laboratory.request
    words = ["fptq-onnx", "convert", str(request.model), "--recipe", str(folder / "recipe.yaml")]
    if request.calibration is not None:
        words += ["--calibration", str(request.calibration)]
    return shlex.join(words)
