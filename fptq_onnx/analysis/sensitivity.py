"""Which layers hurt: groups of layers quantized one after another, then single layers, the most suspicious first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fptq_onnx.analysis.campaign import Campaign
from fptq_onnx.analysis.experiments import Experiment, Measurement
from fptq_onnx.analysis.inspection import Inspection, inspect_segment
from fptq_onnx.analysis.result import Group, LayerSensitivity
from fptq_onnx.analysis.subject import Subject
from fptq_onnx.progress import Progress

__all__ = ["inspect", "layer_losses", "measure_groups", "measure_layers", "sensitivities"]

_ATTENTION = ("q", "k", "v", "qkv", "kv", "o")
_FEED_FORWARD = ("gate", "up", "gate_up", "down", "fc1", "fc2")


def inspect(campaign: Campaign, subject: Subject, progress: Progress) -> dict[str, Inspection]:
    """Inspect every quantized layer on the first batch, by label."""
    stored = campaign.laboratory.store.load_json("inspection")
    if stored is not None:
        return {label: Inspection(**fields) for label, fields in stored.items()}
    found: dict[str, Inspection] = {}
    with progress.stage("Inspecting layers", len(subject.chain.segments)) as advance:
        for segment in subject.chain.segments:
            for inspection in inspect_segment(subject, segment, campaign.laboratory.batches[0]):
                found[inspection.label] = inspection
            advance(1)
    campaign.laboratory.store.save_json("inspection", {label: vars(each) for label, each in found.items()})
    return found


def _groups(subject: Subject, labels: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(kind, name, labels): attention and feed-forward, each role, each block."""
    by_name: dict[tuple[str, str], list[str]] = defaultdict(list)
    for label in labels:
        layer = subject.layers[label]
        part = "attention" if layer.role in _ATTENTION else "feed-forward" if layer.role in _FEED_FORWARD else "other"
        by_name["part", part].append(label)
        by_name["role", str(layer.role)].append(label)
        if layer.block is not None:
            by_name["block", f"block {layer.block}"].append(label)
    order = ("part", "role", "block")
    return [
        (kind, name, tuple(members))
        for (kind, name), members in sorted(by_name.items(), key=lambda item: order.index(item[0][0]))
        if not (kind == "role" and len(members) == len(labels))
    ]


def measure_groups(campaign: Campaign, subject: Subject, until: float | None) -> list[Group]:
    """Quantize module groups one after another, the rest float; the worst first within each kind."""
    labels = [label for label in subject.layers if subject.names((label,))]
    groups = _groups(subject, labels)
    found = campaign.several([Experiment(members) for _, _, members in groups], "Measuring groups", until)
    measured = [
        Group(name, kind, len(members), found[Experiment(members)].loss)
        for kind, name, members in groups
        if Experiment(members) in found
    ]
    return sorted(measured, key=lambda group: (("part", "role", "block").index(group.kind), -group.metric_loss))


def measure_layers(
    campaign: Campaign,
    subject: Subject,
    groups: Sequence[Group],
    inspections: Mapping[str, Inspection],
    until: float | None,
) -> dict[Experiment, Measurement]:
    """Quantize single layers, the rest float, those first that the groups and their own noise make suspicious."""
    loss = {(group.kind, group.name): max(group.metric_loss, 0.0) for group in groups}
    blocks = [value for (kind, _), value in loss.items() if kind == "block"]
    typical = sum(blocks) / len(blocks) if blocks else 1.0

    def suspicion(label: str) -> float:
        layer = subject.layers[label]
        noise = 10 ** (-inspections[label].snr_db / 10) if label in inspections else 1.0
        block = loss.get(("block", f"block {layer.block}"), typical)
        return noise * block * loss.get(("role", str(layer.role)), 1.0)

    labels = sorted((label for label in subject.layers if subject.names((label,))), key=suspicion, reverse=True)
    return campaign.several([Experiment((label,)) for label in labels], "Measuring layers", until)


def layer_losses(campaign: Campaign, subject: Subject) -> dict[str, float]:
    """Loss of each layer that was measured alone, by label."""
    singles = {Experiment((label,)): label for label in subject.layers}
    return {singles[e]: measured.loss for e, measured in campaign.known(list(singles)).items()}


def sensitivities(
    subject: Subject, losses: Mapping[str, float], inspections: Mapping[str, Inspection], kernels: Mapping[str, str]
) -> list[LayerSensitivity]:
    """Every inspected layer, worst first; those that were not measured come last, the noisiest first."""
    entries = []
    for label, seen in inspections.items():
        layer, plan = subject.layers[label], subject.entry(label)
        entries.append(
            LayerSensitivity(
                name=label,
                node=layer.name,
                role=str(layer.role),
                block=layer.block,
                metric_loss=losses.get(label),
                snr_db=seen.snr_db,
                activation_snr_db=seen.activation_snr_db,
                weight_snr_db=seen.weight_snr_db,
                scheme=str(plan.scheme),
                range=plan.activation_range,
                code_use=seen.code_use,
                weight_peak=seen.weight_peak,
                kernel=kernels.get(layer.name),
            )
        )
    return sorted(entries, key=lambda e: (e.metric_loss is None, -(e.metric_loss or 0.0), e.snr_db))
