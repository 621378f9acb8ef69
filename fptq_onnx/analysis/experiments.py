"""One measurement as data: which recipe, which layers are quantized, and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Experiment", "Measurement", "Ranges"]

Ranges = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Experiment:
    """A model quantized in part or whole, to be measured.

    Attributes:
        layers: Labels of the layers to quantize; None quantizes every layer that the recipe quantizes.
        overrides: Fields of the recipe to change, as `Recipe.with_overrides` takes them, sorted by name.
        ranges: Which data the activations were observed on: the calibration data, or (to judge those) the evaluation
            data themselves.
    """

    layers: tuple[str, ...] | None = None
    overrides: tuple[tuple[str, Any], ...] = ()
    ranges: Ranges = "calibration"

    @classmethod
    def of(cls, overrides: Mapping[str, Any], layers: tuple[str, ...] | None = None) -> Experiment:
        """An experiment from a mapping of overrides; lists become tuples."""
        fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
        return cls(layers, tuple(sorted(fixed.items())))

    @property
    def changes(self) -> dict[str, Any]:
        """The overrides as a mapping."""
        return dict(self.overrides)

    @property
    def key(self) -> str:
        """Identity, the same in every process."""
        return json.dumps([self.layers, self.overrides, self.ranges])


@dataclass(frozen=True)
class Measurement:
    """What came out of an experiment.

    Attributes:
        loss: How much worse than the float model, in the metric's loss unit.
        figures: Everything the metric gave, its own value under its name.
        seconds: Time it took, preparation included.
    """

    loss: float
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
