"""Which layers to keep float: the shortest list that reaches a target, and the longest one that costs no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fptq_onnx.analysis.campaign import Campaign
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.speed import CostModel
from fptq_onnx.analysis.study import Study

__all__ = ["Mixed", "mix"]

# Single losses are measured again under the recipe that will be used for this many layers: it changes their order.
_RERANKED = 16
# More float layers than this share would no longer be a quantized model, however cheap they are.
_MOST_FREE = 0.2
# Without a target the list halves the loss.
_DEFAULT_TARGET = 0.5


@dataclass(frozen=True)
class Mixed:
    """Step 5 of the protocol.

    Attributes:
        order: Layers by what keeping them float is expected to gain, best first.
        target: Loss to reach.
        layers: The shortest head of `order` that reaches it; all that were tried where none does.
        measured: With these layers float.
        reached: Whether the target is reached.
        free: The longest head of `order`, a fifth of the layers at most, that leaves the model no slower than the
            recipe asked for.
        free_measured: With those float; None where there is no such layer.
    """

    order: tuple[str, ...]
    target: float
    layers: tuple[str, ...]
    measured: Measurement
    reached: bool
    free: tuple[str, ...]
    free_measured: Measurement | None


def mix(
    campaign: Campaign,
    study: Study,
    costs: CostModel,
    losses: Mapping[str, float],
    whole: Measurement,
    target: float | None,
    until: float | None,
) -> Mixed | None:
    """Find both lists for the best recipe of the study; None where nothing could be measured in the time.

    Args:
        campaign: Measures.
        study: Its best recipe is where layers are taken out.
        costs: Prices.
        losses: Single-layer losses by label, under the recipe that was asked for.
        whole: The best recipe with all layers quantized.
        target: Loss to reach; None for half of `whole`'s.
        until: When to stop.
    """
    best = study.best
    subject = campaign.laboratory.subject(best)
    labels = [label for label in subject.layers if subject.names((label,))]
    ranked = sorted((label for label in labels if label in losses), key=lambda label: -losses[label])
    if not ranked:
        return None
    if best.overrides:
        again = {Experiment((label,), best.overrides): label for label in ranked[:_RERANKED]}
        found = campaign.several(list(again), "Ranking again", until)
        fresh = {again[experiment]: measured.loss for experiment, measured in found.items()}
        head = sorted(fresh, key=lambda label: -fresh[label])
        ranked = [*head, *(label for label in ranked if label not in fresh)]
    goal = _DEFAULT_TARGET * whole.loss if target is None else target

    def without(count: int) -> Measurement | None:
        if count == 0:
            return whole
        rest = tuple(label for label in labels if label not in ranked[:count])
        experiment = Experiment(rest, best.overrides)
        return campaign.several([experiment], "Keeping layers float", until).get(experiment)

    count, measured = _shortest(len(ranked), goal, without)
    limit = study.points[0].seconds_per_batch
    room = 0
    most = int(_MOST_FREE * len(labels))
    while room < min(most, len(ranked)) and costs.seconds(subject, ranked[: room + 1]) <= limit:
        room += 1
    return Mixed(
        order=tuple(ranked),
        target=goal,
        layers=tuple(ranked[:count]),
        measured=measured or whole,
        reached=measured is not None and measured.loss <= goal,
        free=tuple(ranked[:room]),
        free_measured=without(room) if room else None,
    )


def _shortest(most: int, goal: float, without: Callable[[int], Measurement | None]) -> tuple[int, Measurement | None]:
    """Double the count until the goal is reached, then halve the step; (count, what it gave)."""
    low, high, reached = 0, 0, without(0)
    if reached is not None and reached.loss <= goal:
        return 0, reached
    last = reached
    count = 1
    while True:
        measured = without(min(count, most))
        if measured is None:
            return low, last
        last = measured
        if measured.loss <= goal:
            high, reached = min(count, most), measured
            break
        low = min(count, most)
        if count >= most:
            return most, measured
        count *= 2
    while high - low > 1:
        middle = (low + high) // 2
        measured = without(middle)
        if measured is None:
            break
        if measured.loss <= goal:
            high, reached = middle, measured
        else:
            low = middle
    return high, reached
