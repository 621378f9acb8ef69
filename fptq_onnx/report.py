"""What a conversion did, layer by layer: written as JSON beside the model and shown as a table."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = [
    "LayerReport",
    "Report",
    "SkippedReport",
    "Stopwatch",
    "Verification",
    "is_report",
    "peak_memory_bytes",
    "show",
    "versions",
]

REPORTED_PACKAGES = ("fptq-onnx", "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass
class LayerReport:
    """One linear layer.

    Attributes:
        name: Node name in the graph.
        label: Name that is the same in every export of the model, such as `block.3.down`.
        role: q, k, v, o, qkv, gate, up, gate_up, down, fc1, fc2, lm_head or other.
        k: Input channels.
        n: Output channels.
        range: Calibrated activation range v of the layer's input, before equalization.
        scheme: `static`, `equalized-static`, `per-token` or `float`, as planned; the format matmulnbits keeps the
            activations of all of them float.
        equalization: Where the equalization scale went: `norm: <weight>`, `linear: <layer>`, `mul: <why>`, or `none`;
            `+shift` behind the first word, or `shift: <bias>`, where the activation was shifted.
        weight_method: Grid and group of the integer weight, or `float`.
        snr_db: Signal-to-noise ratio of the layer's output, both models run whole; None if not verified. Infinite where
            nothing before the layer was quantized; JSON has no infinity, there it is null too.
        bytes_before: Bytes of the float weight.
        bytes_after: Bytes of what replaced it: integers and their scales.
        reason: Why this scheme, in words.
    """

    name: str
    label: str
    role: str
    k: int
    n: int
    range: float | None
    scheme: str
    equalization: str
    weight_method: str
    snr_db: float | None
    bytes_before: int
    bytes_after: int
    reason: str


@dataclass
class SkippedReport:
    """A MatMul or Gemm that is no linear layer, and why."""

    name: str
    op_type: str
    reason: str


@dataclass
class Verification:
    """The saved file, run again and compared with the float model on `tokens` tokens of `data`.

    Attributes:
        kl_mean: Mean KL(float || quantized) of the next-token distributions, nats per token; None without logits.
        top1_agreement: Share of positions where both models' most likely token is the same; None without logits.
        output_snr_db: Signal-to-noise ratio of the first output.
        max_kl: The threshold `kl_mean` was held against; None if there was none.
        passed: False only if the threshold was missed.
    """

    data: str
    tokens: int
    kl_mean: float | None
    top1_agreement: float | None
    output_snr_db: float
    max_kl: float | None
    passed: bool


@dataclass
class Report:
    """Everything `convert` decided, did and measured. `to_json` gives the documented file `<output>.json`."""

    model: str
    output: str | None
    format: str
    calibration: str
    data_free: bool
    recipe: dict[str, Any]
    rotation: dict[str, str]
    layers: list[LayerReport]
    skipped: list[SkippedReport]
    bytes_before: int
    bytes_after: int | None
    segments: str
    embedding: str = "float"
    plan: str | None = None
    """The plan file that a dry run wrote."""
    verification: Verification | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    segment_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the report as indented JSON, keys as in the attributes."""
        return json.dumps(_json_value(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON to `path`."""
        path.write_text(self.to_json(), encoding="utf-8")

    def schemes(self) -> Counter[str]:
        """Return how many layers have each scheme."""
        return Counter(layer.scheme for layer in self.layers)


def is_report(path: Path) -> bool:
    """Whether a file is the report of an earlier conversion."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"model", "output", "layers", "recipe", "versions"} <= found.keys()


class Stopwatch:
    """Seconds per named stage, in the order the stages ran."""

    def __init__(self) -> None:
        """Start with no stage."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage `name`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)


def peak_memory_bytes() -> int:
    """Return the largest resident set this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that decide the result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _json_value(value: Any) -> Any:
    """Replace what JSON cannot say, infinity and NaN, by null."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(report: Report, console: Console) -> None:
    """Print the layers, grouped by role and scheme, and the model's figures."""
    table = Table(title=escape(f"{report.model} -> {report.output or 'dry run'}"), title_justify="left")
    for heading, right in (
        ("role", False),
        ("scheme", False),
        ("layers", True),
        ("range", True),
        ("equalization", False),
        ("weights", False),
        ("worst SNR dB", True),
    ):
        table.add_column(heading, justify="right" if right else "left")
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        groups.setdefault((layer.role, layer.scheme), []).append(layer)
    for (role, scheme), layers in sorted(groups.items()):
        ranges = [layer.range for layer in layers if layer.range is not None]
        noise = [layer.snr_db for layer in layers if layer.snr_db is not None]
        table.add_row(
            role,
            scheme,
            str(len(layers)),
            f"{min(ranges):.1f} .. {max(ranges):.1f}" if ranges else "-",
            ", ".join(sorted({layer.equalization.split(":")[0] for layer in layers})),
            ", ".join(sorted({layer.weight_method for layer in layers})),
            f"{min(noise):.1f}" if noise else "-",
        )
    console.print(table)
    counts = ", ".join(f"{count} {scheme}" for scheme, count in report.schemes().items())
    console.print(
        f"{len(report.layers)} linear layers: {counts}; {len(report.skipped)} other MatMul/Gemm nodes left alone"
    )
    if report.embedding != "float":
        console.print(f"embedding: {escape(report.embedding)}")
    if report.plan is not None:
        console.print(f"plan: {escape(report.plan)} (edit it, and carry it out with --plan)")
    if report.bytes_after is not None:
        ratio = report.bytes_after / report.bytes_before
        console.print(f"{report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB ({ratio:.0%})")
    if report.verification is not None:
        _show_verification(report.verification, console)


def _show_verification(check: Verification, console: Console) -> None:
    parts = [f"output SNR {check.output_snr_db:.1f} dB"]
    if check.kl_mean is not None and check.top1_agreement is not None:
        parts = [f"mean KL {check.kl_mean:.4f} nats", f"top-1 agreement {check.top1_agreement:.1%}", *parts]
    console.print(f"verified on {check.tokens} tokens of {escape(check.data)}: " + ", ".join(parts))
    if not check.passed:
        console.print(f"[bold red]mean KL is over the allowed {check.max_kl}[/bold red]")
