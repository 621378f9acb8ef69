"""A benchmark's report as tables."""

from __future__ import annotations

__all__ = ["show"]

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fptq_onnx.benchmark.results import BenchmarkReport, CaseResult, Kind, LayerTime, ModelResult, PhaseProfile, Spread

_MEGABYTE = 1e6
_OPS_SHOWN = 8


def show(report: BenchmarkReport, console: Console) -> None:
    """Print the speeds of all models, then for each where its time goes."""
    settings = report.settings
    threads = "threads chosen by onnxruntime" if settings.threads is None else f"{settings.threads} threads"
    console.print(
        f"{settings.provider}, {threads}, {report.cores} cores; median (smallest-largest) of {settings.rounds} "
        "interleaved rounds",
        highlight=False,
    )
    names = _names(report.models)
    for index, case in enumerate(report.models[0].cases):
        console.print(_speeds(report.models, names, index, case))
    for model, name in zip(report.models, names, strict=True):
        console.print(f"{escape(name)}: {_facts(model)}", highlight=False)
        if model.note is not None:
            console.print(f"  {escape(model.note)}", style="yellow", highlight=False)
    for model, name in zip(report.models, names, strict=True):
        for phase, profile in (("prefill", model.prefill_profile), ("decode step", model.decode_profile)):
            if profile is not None and model.profile_case is not None:
                shape = f"batch {model.profile_case.batch}, length {model.profile_case.length}"
                _show_profile(f"{name}, {phase} ({shape})", profile, model is report.models[0], console)
    if settings.provider == "cuda" and settings.profile:
        console.print("Times of nodes on the GPU are those of launching them.", style="yellow")


def _speeds(models: Sequence[ModelResult], names: Sequence[str], index: int, first: CaseResult) -> Table:
    case = first.case
    table = Table(title=f"batch {case.batch}, length {case.length}", title_justify="left")
    table.add_column("model", no_wrap=True)
    encoder = models[0].kind is Kind.ENCODER
    headings = ["sequences/s", "tokens/s"] if encoder else ["prefill tokens/s", "first token, ms"]
    decodes = any(model.cases[index].decode is not None for model in models)
    headings += ["decode tokens/s"] if decodes else []
    headings += ["peak MB"]
    gpu = any(model.cases[index].memory.gpu_bytes is not None for model in models)
    headings += ["GPU MB"] if gpu else []
    if len(models) > 1:
        headings += ["x prefill"] + (["x decode"] if decodes else [])
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for model, name in zip(models, names, strict=True):
        result = model.cases[index]
        cells = [result.sequences, result.prefill] if encoder else [result.prefill, result.first_token_ms]
        cells += [result.decode] if decodes else []
        row = [_spread(cell) for cell in cells]
        row.append(f"{result.memory.model_bytes / _MEGABYTE:.0f}")
        if gpu:
            row.append("-" if result.memory.gpu_bytes is None else f"{result.memory.gpu_bytes / _MEGABYTE:.0f}")
        if len(models) > 1:
            row.append(_spread(result.prefill_ratio, digits=2))
            row += [_spread(result.decode_ratio, digits=2)] if decodes else []
        table.add_row(escape(name), *row)
    return table


def _facts(model: ModelResult) -> str:
    facts = [
        str(model.kind),
        f"{model.file_bytes / _MEGABYTE:.0f} MB of files",
        f"opened in {model.load_seconds:.2f} s",
        f"first run {model.cold_first_token_ms:.0f} ms",
        f"peak {model.memory.model_bytes / _MEGABYTE:.0f} MB over the {model.memory.before_bytes / _MEGABYTE:.0f} MB "
        "of Python and onnxruntime",
        ", ".join(map(_short, model.providers)),
    ]
    if model.library:
        facts.append("op library registered")
    return "; ".join(facts)


def _show_profile(title: str, profile: PhaseProfile, with_layers: bool, console: Console) -> None:
    ops = Table(title=f"{escape(title)}: {profile.node_microseconds / 1e3:.2f} ms in nodes", title_justify="left")
    for heading in ("operator", "provider", "nodes", "ms", "share"):
        ops.add_column(heading, justify="left" if heading in ("operator", "provider") else "right")
    for op in profile.ops[:_OPS_SHOWN]:
        ops.add_row(op.op, _short(op.provider), str(op.nodes), f"{op.microseconds / 1e3:.3f}", f"{op.share:.1%}")
    rest = profile.ops[_OPS_SHOWN:]
    if rest:
        time, share = sum(op.microseconds for op in rest), sum(op.share for op in rest)
        ops.add_row(f"{len(rest)} others", "", str(sum(op.nodes for op in rest)), f"{time / 1e3:.3f}", f"{share:.1%}")
    console.print(ops)
    if not with_layers or not profile.layers:
        return
    layers = Table(title="linear layers", title_justify="left")
    for heading in ("layers", "operator", "kernel", "provider", "rows", "count", "ms", "share"):
        layers.add_column(heading, justify="right" if heading in ("rows", "count", "ms", "share") else "left")
    for (role, op_type, kernel, provider, rows), group in _grouped(profile.layers).items():
        time, share = sum(layer.microseconds for layer in group), sum(layer.share for layer in group)
        layers.add_row(
            role,
            op_type,
            kernel or "-",
            _short(provider),
            str(rows),
            str(len(group)),
            f"{time / 1e3:.3f}",
            f"{share:.1%}",
        )
    console.print(layers)


def _grouped(layers: Sequence[LayerTime]) -> dict[tuple[str, str, str | None, str, int], list[LayerTime]]:
    """Layers of one role that ran the same way, as one line; --json has them all."""
    groups: dict[tuple[str, str, str | None, str, int], list[LayerTime]] = defaultdict(list)
    for layer in layers:
        block, _, role = layer.label.rpartition(".")
        role = f"block.*.{role}" if block.startswith("block.") else layer.label
        groups[role, layer.op, layer.kernel, layer.provider, layer.rows].append(layer)
    return groups


def _spread(spread: Spread | None, digits: int | None = None) -> str:
    if spread is None:
        return "-"
    places = digits if digits is not None else 0 if spread.median >= 100 else 1 if spread.median >= 10 else 2
    return f"{spread.median:.{places}f} ({spread.low:.{places}f}-{spread.high:.{places}f})"


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _names(models: Sequence[ModelResult]) -> list[str]:
    """File names where they differ, else with as much of their folders as tells them apart."""
    parts = [Path(model.path).parts for model in models]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{model.path} ({index})" for index, model in enumerate(models, start=1)]
