"""The troubleshooting guide as rules: each looks at the evidence and names layers, numbers and the option that acts.

A rule's priority is the share of the loss that its action was measured to recover, divided by how unspecific it is: one
wrong layer or one wrong data set comes before "everything is a little worse". Speed is judged by the share of
activations that could be static.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence

from fptq_onnx.analysis.evidence import Evidence, label_patterns
from fptq_onnx.analysis.experiments import Experiment
from fptq_onnx.analysis.inspection import clipped_share, outlier_channels
from fptq_onnx.analysis.lae import equalization_not_helping
from fptq_onnx.analysis.result import Finding
from fptq_onnx.quantization.policy import Scheme

__all__ = ["RULES", "diagnose"]

Rule = Callable[[Evidence], list[Finding]]

# An action that recovers less is noise.
_WORTH_TELLING = 0.05
# Largest over median channel from which on a channel is called an outlier; trained models reach 5 to 15 in most layers.
_OUTLIER = 20.0
# Layers whose actions are tried; each try runs the whole model once.
_TRIED = 3
# A layer that has this share of all single losses is a culprit, not one of many.
_CULPRIT = 0.2
# A change of thresholds that makes layers static may raise the loss to this multiple.
_STATIC_TOLERANCE = 1.5
_INTEGER_KERNELS = ("W4A8MatMul", "W8A8MatMul", "DynamicQuantizeW4A8MatMul")


def diagnose(evidence: Evidence) -> list[Finding]:
    """Apply every rule; findings by priority."""
    findings = [finding for rule in RULES for finding in rule(evidence)]
    explained = {label for finding in findings if finding.kind == "outlier-channel" for label in finding.layers}
    told = [f for f in findings if not (f.kind == "sensitive-activation" and explained.issuperset(f.layers))]
    return sorted(told, key=lambda finding: -finding.priority)


def command(evidence: Evidence, *options: str) -> str:
    """The command line that converts the model with more options."""
    request = evidence.campaign.laboratory.request
    words = ["fptq-onnx", "convert", str(request.model), *request.options]
    if request.calibration is not None:
        words += ["--calibration", str(request.calibration)]
    return shlex.join([*words, *options])


def calibration_not_representative(evidence: Evidence) -> list[Finding]:
    """AQ-001: what would ranges of the evaluation data give, and which layers clip them."""
    recovered = evidence.recovered(Experiment(ranges="evaluation"))
    if recovered is None or recovered < 0.2:
        return []
    ratios = {}
    for layer in evidence.sensitivity:
        entry = evidence.subject.entry(layer.name)
        seen = evidence.subject.planned.statistics.get(entry.activation)
        wanted = evidence.evaluation.statistics.get(entry.activation)
        if seen is not None and wanted is not None and seen.absmax > 0:
            ratios[layer.name] = (wanted.absmax / seen.absmax, clipped_share(wanted, seen.absmax))
    worst = sorted(ratios, key=lambda label: -abs(math.log(max(ratios[label][0], 1e-9))))[:5]
    said = [
        f"With ranges of the evaluation data the loss falls by {recovered:.0%}, everything else unchanged.",
        *(
            f"{label}: the evaluation data reach {ratios[label][0]:.2g} times the calibrated range; "
            f"{ratios[label][1]:.2%} of their values are clipped."
            for label in worst
        ),
    ]
    if evidence.known_tokens is not None:
        said.insert(1, f"{evidence.known_tokens:.0%} of the evaluation tokens occur in the calibration data.")
    request = evidence.campaign.laboratory.request
    action = shlex.join(
        [
            "fptq-onnx",
            "convert",
            str(request.model),
            *request.options,
            "--calibration",
            f"TEXT_LIKE_{request.text.name}",
        ]
    )
    return [
        Finding(
            "AQ-001",
            "calibration-not-representative",
            "The calibration data are not like the evaluation data",
            worst,
            said,
            action,
            recovered,
            recovered,
        )
    ]


def outlier_channels_hurt(evidence: Evidence) -> list[Finding]:
    """AQ-001: a few channels or tokens are so large that int8 has no codes left for the others."""
    found: list[Finding] = []
    seen: set[str] = set()
    for layer in list(evidence.sensitivity)[: 4 * _TRIED]:
        entry = evidence.subject.entry(layer.name)
        statistics = evidence.subject.planned.statistics[entry.activation]
        outliers = [(channel, times) for channel, times in outlier_channels(statistics) if times >= _OUTLIER]
        # Outlier channels cost accuracy only where the activation is what makes the noise.
        if not outliers or layer.activation_snr_db >= layer.weight_snr_db or entry.activation in seen:
            continue
        seen.add(entry.activation)
        labels = evidence.readers(layer.name)
        if len(found) == _TRIED or evidence.share(labels) < 0.02:
            continue
        options, recovered = _best_action(evidence, labels, entry.activation_range)
        if recovered is None or recovered < _WORTH_TELLING:
            continue
        channel, times = outliers[0]
        tokens = statistics.token_absmax
        typical = float(sorted(tokens)[len(tokens) // 2]) if len(tokens) else 0.0
        found.append(
            Finding(
                "AQ-001",
                "outlier-channel",
                f"Channel {channel} of the input of {', '.join(labels)} is {times:.0f} times the median channel",
                labels,
                [
                    f"Range {statistics.absmax:.4g}, quantized {entry.scheme}: 95 % of the values share "
                    f"{layer.code_use:.0%} of the int8 codes.",
                    "Largest channels: " + ", ".join(f"{c} ({t:.0f} times the median)" for c, t in outliers) + ".",
                    f"The largest token reaches {statistics.absmax / typical:.3g} times the median token."
                    if typical
                    else "Most tokens are zero here.",
                    f"Noise of the activation {layer.activation_snr_db:.1f} dB, of the weights "
                    f"{layer.weight_snr_db:.1f} dB: the activation decides.",
                    f"Quantized alone, these layers make {evidence.share(labels):.0%} of all single-layer losses.",
                ],
                command(evidence, *options),
                recovered,
                recovered,
            )
        )
    return found


def _best_action(
    evidence: Evidence, labels: Sequence[str], activation_range: float | None
) -> tuple[list[str], float | None]:
    """The cheaper of what helps: another scheme for the range if it recovers nearly as much as float layers."""
    tried: list[tuple[list[str], float]] = []
    kept = evidence.recovered(evidence.without(labels))
    excluded = [word for pattern in label_patterns(labels) for word in ("--exclude", pattern)]
    recipe = evidence.subject.recipe
    thresholds: dict[str, float] = {}
    if activation_range is not None and recipe.activations.scheme == "policy":
        scheme = evidence.subject.entry(labels[0]).scheme
        if scheme is Scheme.PER_TOKEN and recipe.equalization.method != "none":
            thresholds = {"activations.v1": float(math.ceil(activation_range * 1.01))}
        elif scheme is not Scheme.PER_TOKEN:
            below = float(f"{activation_range * 0.99:.3g}")
            thresholds = {"activations.v1": below} | (
                {"activations.v0": below} if recipe.activations.v0 > below else {}
            )
    if thresholds:
        changed = evidence.recovered(Experiment.of(thresholds))
        if changed is not None:
            tried.append(([word for name, v in thresholds.items() for word in ("--set", f"{name}={v:g}")], changed))
    if tried and (kept is None or tried[0][1] >= 0.8 * kept):
        return tried[0]
    return excluded, kept


def culprits(evidence: Evidence) -> list[Finding]:
    """AQ-004: single layers that have far more than their share of the loss."""
    found = []
    for layer in list(evidence.sensitivity)[:_TRIED]:
        share = evidence.share([layer.name])
        if layer.metric_loss is None or share < _CULPRIT:
            continue
        recovered = evidence.recovered(evidence.without([layer.name]))
        if recovered is None or recovered < _WORTH_TELLING:
            continue
        weights = layer.weight_snr_db < layer.activation_snr_db
        others = sorted(seen.weight_peak for seen in evidence.inspections.values())
        reason = (
            f"Its weights decide: {layer.weight_snr_db:.1f} dB against {layer.activation_snr_db:.1f} dB of its "
            f"activation; its largest weight is {layer.weight_peak:.0f} times their root mean square (median of all "
            f"layers {others[len(others) // 2]:.0f})."
            if weights
            else f"Its activation decides: {layer.activation_snr_db:.1f} dB against {layer.weight_snr_db:.1f} dB of "
            f"its weights; it is quantized {layer.scheme} at a range of {layer.range or 0:.4g}."
        )
        found.append(
            Finding(
                "AQ-004",
                "sensitive-weights" if weights else "sensitive-activation",
                f"{layer.name} alone makes {share:.0%} of all single-layer losses",
                [layer.name],
                [f"Quantized alone it loses {layer.metric_loss:.4g}.", reason],
                command(evidence, "--exclude", *label_patterns([layer.name])),
                recovered,
                # Where the cause is known, the rule that names it comes first.
                recovered * (1.0 if weights else 0.9),
            )
        )
    return found


def ranking(evidence: Evidence) -> list[Finding]:
    """AQ-004: the shortest list of layers to keep float."""
    mixed = evidence.mixed
    if mixed is None or not mixed.layers or evidence.whole.loss <= 0:
        return []
    changes = evidence.study.best.changes if evidence.study is not None else {}
    options = [word for name, value in changes.items() for word in ("--set", f"{name}={_yaml(value)}")]
    options += [word for pattern in label_patterns(mixed.layers) for word in ("--exclude", pattern)]
    recovered = 1 - mixed.measured.loss / evidence.whole.loss
    count = len(mixed.layers)
    goal = "reaches" if mixed.reached else "does not reach"
    return [
        Finding(
            "AQ-004",
            "layers-to-keep-float",
            f"Keeping {count} layer{'s' if count > 1 else ''} float {goal} a loss of {mixed.target:.4g}",
            list(mixed.layers),
            [
                f"Loss {evidence.whole.loss:.4g} with all layers quantized, {mixed.measured.loss:.4g} with these float"
                + (" and the changes of the command." if changes else "."),
                f"They make {evidence.share(mixed.layers):.0%} of all single-layer losses.",
            ],
            command(evidence, *options),
            recovered,
            max(recovered, 0.0) / (1 + math.log2(1 + count)),
        )
    ]


def too_aggressive(evidence: Evidence) -> list[Finding]:
    """AQ-001: no culprit, but a finer grid or smaller groups lose much less."""
    if evidence.study is None or evidence.whole.loss <= 0:
        return []
    finer = [
        point
        for point in evidence.study.points
        if point.changes and not point.kept_float and all(name.startswith("weights.") for name in point.changes)
    ]
    if not finer:
        return []
    best = min(finer, key=lambda point: point.loss)
    recovered = 1 - best.loss / evidence.whole.loss
    if recovered < _WORTH_TELLING:
        return []
    options = [word for name, value in best.changes.items() for word in ("--set", f"{name}={_yaml(value)}")]
    top = list(evidence.losses)[: max(1, len(evidence.losses) // 10)]
    return [
        Finding(
            "AQ-001",
            "too-aggressive",
            "All weights are quantized more coarsely than needed",
            top,
            [
                f"With {', '.join(f'{name}={_yaml(value)}' for name, value in best.changes.items())} the loss is "
                f"{best.loss:.4g} instead of {evidence.whole.loss:.4g}, at "
                f"{best.seconds_per_batch / evidence.study.points[0].seconds_per_batch:.2f} times the time.",
                f"The worst tenth of the layers has {evidence.share(top):.0%} of the single-layer losses.",
            ],
            command(evidence, *options),
            recovered,
            0.3 * recovered,
        )
    ]


def too_many_per_token(evidence: Evidence) -> list[Finding]:
    """AQ-002: layers that quantize per token although static scales would do."""
    plan = evidence.subject.planned.plan
    dynamic = [layer for layer in plan.layers if layer.scheme is Scheme.PER_TOKEN]
    if evidence.study is None or not dynamic:
        return []
    total = sum(layer.is_quantized for layer in plan.layers)
    now = evidence.study.points[0]
    limit = max(_STATIC_TOLERANCE * now.loss, now.loss)
    cheaper = [
        point for point in evidence.study.points if point.static_share > now.static_share and point.loss <= limit
    ]
    thresholds = {"activations.v0", "activations.v1"}
    cheaper = [point for point in cheaper if point.changes.keys() <= thresholds and not point.kept_float]
    if not cheaper:
        return []
    best = max(cheaper, key=lambda point: (round(point.static_share, 3), -point.loss))
    gained = best.static_share - now.static_share
    if gained < _WORTH_TELLING or (gained < 0.5 and best.seconds_per_batch >= now.seconds_per_batch):
        return []
    kernels = {kernel.node: kernel for kernel in evidence.kernels}
    first = kernels.get(f"{dynamic[0].activation}.quantize")
    return [
        Finding(
            "AQ-002",
            "too-many-per-token",
            f"{len(dynamic)} of {total} quantized layers read activations that are quantized per token",
            [layer.label for layer in dynamic],
            [
                f"Quantizing per token takes {evidence.costs.dynamic_share(evidence.subject):.1%} of the time"
                + (f" ({first.op} on {first.provider})." if first is not None else "."),
                f"With v0={best.v0:g} and v1={best.v1:g} {best.static_share:.0%} of the layers are static instead of "
                f"{now.static_share:.0%}: {now.seconds_per_batch / best.seconds_per_batch - 1:+.1%} speed, loss "
                f"{best.loss:.4g} instead of {now.loss:.4g}.",
            ],
            command(
                evidence,
                *(word for name, value in best.changes.items() for word in ("--set", f"{name}={_yaml(value)}")),
            ),
            None,
            # Few per-token layers are what the policy is for; many are a fault of the thresholds.
            gained if now.static_share < 0.5 else 0.3 * gained,
        )
    ]


def wrong_provider(evidence: Evidence) -> list[Finding]:
    """AQ-002: layers that run elsewhere than asked for, or not through the integer kernel."""
    request = evidence.campaign.laboratory.request
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[request.provider]
    labels = {
        layer.node: layer.name
        for layer in evidence.sensitivity
        if evidence.subject.entry(layer.name).weight_method != "float"
    }
    stray = [
        kernel
        for kernel in evidence.kernels
        if kernel.node in labels and (kernel.provider != wanted or kernel.op not in _INTEGER_KERNELS)
    ]
    if not stray:
        return []
    return [
        Finding(
            "AQ-002",
            "wrong-kernel",
            f"{len(stray)} quantized layers do not run on the integer kernel of {wanted}",
            [labels[kernel.node] for kernel in stray],
            [f"{labels[kernel.node]}: {kernel.op} on {kernel.provider}." for kernel in stray[:5]],
            command(evidence, "--provider", request.provider),
            None,
            len(stray) / max(1, len(labels)),
        )
    ]


def lae_does_not_help(evidence: Evidence) -> list[Finding]:
    """AQ-003: equalization that loses against what it replaces, layer by layer and as a whole."""
    plan = evidence.subject.planned.plan
    equalized = [layer for layer in plan.layers if layer.scheme is Scheme.EQUALIZED_STATIC]
    if not equalized:
        return []
    recovered = evidence.recovered(Experiment.of({"equalization.method": "none"}))
    weak = equalization_not_helping(evidence)
    if not weak or recovered is None or recovered < _WORTH_TELLING:
        return []
    recipe = evidence.subject.recipe
    said = [each.sentence for each in weak[:5]]
    outside = [layer.label for layer in plan.layers if (layer.activation_range or 0) >= recipe.activations.v1]
    if outside:
        said.append(
            f"Out of its reach (range at or over v1 = {recipe.activations.v1:g}, per token): {', '.join(outside[:6])}."
        )
    said.append(f"Per token instead of {recipe.equalization.method} recovers {recovered:.0%} of the loss.")
    return [
        Finding(
            "AQ-003",
            "equalization-does-not-help",
            f"{recipe.equalization.method.upper()} does not help {len(weak)} of {len(equalized)} equalized layers",
            [each.label for each in weak],
            said,
            command(evidence, "--set", "equalization.method=none"),
            recovered,
            0.7 * recovered,
        )
    ]


def _yaml(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


RULES: tuple[Rule, ...] = (
    calibration_not_representative,
    outlier_channels_hurt,
    culprits,
    too_aggressive,
    too_many_per_token,
    wrong_provider,
    lae_does_not_help,
    ranking,
)
