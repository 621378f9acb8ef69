"""What an analysis found, as data: the keys of analysis.json."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Analysis", "Finding", "Group", "LayerSensitivity", "Model", "StudyPoint"]


@dataclass
class Model:
    """A model that was measured as a whole.

    Attributes:
        value: The metric's value.
        loss: How much worse than the float model; 0 for it.
        figures: Everything the metric gave.
        seconds_per_batch: Sum of kernel times for the first batch of the evaluation data.
        speedup: Float seconds over these.
    """

    value: float
    loss: float
    figures: dict[str, float]
    seconds_per_batch: float | None = None
    speedup: float | None = None


@dataclass
class Group:
    """Layers that were quantized together, the rest float."""

    name: str
    kind: str
    layers: int
    metric_loss: float


@dataclass
class LayerSensitivity:
    """One layer quantized alone, the rest float.

    Attributes:
        name: Label, the same in every export of the model.
        node: Node name in the graph.
        role: Role of the layer.
        block: Its block; None outside.
        metric_loss: Loss of the metric; None where time ran out before it was measured.
        snr_db: Signal-to-noise ratio of its own output on float inputs.
        activation_snr_db: With int8 activations alone.
        weight_snr_db: With int4 weights alone.
        scheme: How its activation is quantized.
        range: Calibrated range of its activation.
        code_use: Share of the int8 codes that hold 95 % of the activation's values.
        weight_peak: Largest |W| over its root mean square.
        kernel: Operator that ran, with its execution provider.
    """

    name: str
    node: str
    role: str
    block: int | None
    metric_loss: float | None
    snr_db: float
    activation_snr_db: float
    weight_snr_db: float
    scheme: str
    range: float | None
    code_use: float
    weight_peak: float
    kernel: str | None = None


@dataclass
class StudyPoint:
    """One recipe of the threshold and granularity study.

    Attributes:
        changes: Fields that differ from the recipe that was asked for.
        v0: Lower threshold.
        v1: Upper threshold.
        loss: Loss of the metric.
        seconds_per_batch: Sum of kernel times.
        speedup: Float seconds over these.
        static_share: Share of int8 layers with static scales.
        on_front: No other point is both faster and more accurate.
        kept_float: Layers left float on top of the recipe's.
    """

    changes: dict[str, Any]
    v0: float
    v1: float
    loss: float
    seconds_per_batch: float
    speedup: float
    static_share: float
    on_front: bool = False
    kept_float: tuple[str, ...] = ()


@dataclass
class Finding:
    """A diagnosis.

    Attributes:
        id: AQ-001 (accuracy), AQ-002 (speed), AQ-003 (equalization), AQ-004 (sensitive layers).
        kind: The rule within it, such as "outlier-channel".
        title: One line.
        layers: The layers concerned, worst first.
        evidence: Numbers that support it, one sentence each.
        action: The command that acts on it.
        recovers: Share of the quantization loss that the action was measured to recover; None for what acts on speed.
        priority: 0..1, what the findings are sorted by.
    """

    id: str
    kind: str
    title: str
    layers: list[str]
    evidence: list[str]
    action: str
    recovers: float | None
    priority: float


@dataclass
class Analysis:
    """Everything an analysis found."""

    model: str
    recipe: str
    metric: dict[str, Any]
    data: dict[str, Any]
    baseline: Model
    quantized: Model | None = None
    groups: list[Group] = field(default_factory=list)
    sensitivity: list[LayerSensitivity] = field(default_factory=list)
    thresholds: list[StudyPoint] = field(default_factory=list)
    mixed: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    proposal: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    measurements: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Indented JSON; infinity and NaN, which JSON cannot say, are null."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
