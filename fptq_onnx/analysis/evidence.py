"""Everything the diagnoses look at, gathered once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fptq_onnx.analysis.campaign import Campaign
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.inspection import Inspection
from fptq_onnx.analysis.laboratory import Laboratory
from fptq_onnx.analysis.mixed import Mixed
from fptq_onnx.analysis.result import LayerSensitivity
from fptq_onnx.analysis.speed import CostModel, Kernel
from fptq_onnx.analysis.study import Study
from fptq_onnx.analysis.subject import Planned, Subject

__all__ = ["Evidence", "known_tokens", "label_patterns"]

_BLOCK_LABEL = re.compile(r"block\.(?P<block>\d+)\.(?P<role>.+)")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the rules read.

    Attributes:
        campaign: Measures what a rule's action would recover.
        subject: The recipe that was asked for, carried out.
        whole: Its measurement with every layer quantized.
        sensitivity: Layers, worst first.
        inspections: By label.
        evaluation: The decisions that the evaluation data themselves would lead to.
        known_tokens: Share of the evaluation tokens whose id occurs in the calibration data; None without token ids.
        costs: Prices.
        kernels: As the recipe's model ran them.
        study: Step 4, None if it was not run.
        mixed: Step 5, likewise.
    """

    campaign: Campaign
    subject: Subject
    whole: Measurement
    sensitivity: Sequence[LayerSensitivity]
    inspections: Mapping[str, Inspection]
    evaluation: Planned
    known_tokens: float | None
    costs: CostModel
    kernels: Sequence[Kernel]
    study: Study | None
    mixed: Mixed | None

    @property
    def losses(self) -> dict[str, float]:
        """Loss of each layer alone, by label, worst first."""
        return {layer.name: layer.metric_loss for layer in self.sensitivity if layer.metric_loss is not None}

    def share(self, labels: Sequence[str]) -> float:
        """Share of these layers in the sum of all single losses."""
        losses = {label: max(loss, 0.0) for label, loss in self.losses.items()}
        total = sum(losses.values())
        return sum(losses.get(label, 0.0) for label in labels) / total if total else 0.0

    def readers(self, label: str) -> list[str]:
        """Labels of the quantized layers that read the same activation, worst first."""
        activation = self.subject.entry(label).activation
        every = [layer.name for layer in self.sensitivity]
        return [other for other in every if self.subject.entry(other).activation == activation]

    def without(self, labels: Sequence[str]) -> Experiment:
        """The recipe that was asked for with these layers float."""
        quantized = [label for label in self.subject.layers if self.subject.names((label,))]
        return Experiment(tuple(label for label in quantized if label not in labels))

    def recovered(self, experiment: Experiment) -> float | None:
        """Share of the loss that an experiment does not have; None if the time is over or there is no loss."""
        if self.whole.loss <= 0:
            return None
        found = self.campaign.several([experiment], "Trying actions").get(experiment)
        return None if found is None else 1 - found.loss / self.whole.loss


def known_tokens(laboratory: Laboratory) -> float | None:
    """Share of the evaluation tokens whose id occurs in the calibration data; None where there are no token ids."""
    calibration = laboratory.calibration_tokens()
    evaluation = laboratory.evaluation_tokens()
    if calibration is None or evaluation is None:
        return None
    return float(np.isin(evaluation, calibration).mean())


def label_patterns(labels: Sequence[str]) -> list[str]:
    r"""The expressions for `--exclude` that match these labels alone, one for each role.

    block.3.q -> block\.3\.q$; block.3.q, block.5.q -> block\.(3|5)\.q$. Blocks are in order, roles as they come.
    """
    blocks: dict[tuple[bool, str], list[int]] = {}
    for label in labels:
        match = _BLOCK_LABEL.fullmatch(label)
        if match is None:
            blocks[False, label] = []
        else:
            blocks.setdefault((True, match["role"]), []).append(int(match["block"]))
    patterns = []
    for (_, role), numbers in blocks.items():
        some = "|".join(map(str, sorted(numbers)))
        place = rf"block\.({some})\." if len(numbers) > 1 else rf"block\.{some}\." if numbers else ""
        patterns.append(f"{place}{re.escape(role)}$")
    return patterns
