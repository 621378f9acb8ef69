"""`fptq-onnx analyze`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fptq_onnx.analysis.analyze import STEPS
from fptq_onnx.analysis.analyze import analyze as run_analysis
from fptq_onnx.analysis.result import Analysis
from fptq_onnx.cli.common import (
    AsJson,
    Assignments,
    CalibrationPath,
    OnProvider,
    Provider,
    TokenizerPath,
    app,
    err,
    out,
    overrides,
    reporting_errors,
)
from fptq_onnx.errors import StoppedError
from fptq_onnx.progress import TerminalProgress
from fptq_onnx.recipe import Recipe

__all__ = ["analyze"]

StepName = StrEnum("StepName", [(step.upper(), step) for step in STEPS])  # type: ignore[misc]


@app.command()
@reporting_errors
def analyze(
    model: Annotated[Path, typer.Argument(help="Float ONNX model.", show_default=False)],
    text: Annotated[
        Path,
        typer.Option("--text", help="UTF-8 text that the metric is computed on, or .npz feeds.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.html, analysis.json and recipe.yaml.")
    ] = Path("report"),
    calibration: CalibrationPath = None,
    tokenizer: TokenizerPath = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Recipe to judge: paper (standard FPTQ), balanced, accurate or a YAML file.")
    ] = "paper",
    assignments: Assignments = [],  # noqa: B006 typer needs a list
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="kl, perplexity, last-word (one passage per line), cosine (encoders), or module:function, called with "
            "the model and returning a score.  \\[default: kl, or cosine without logits]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of the text to measure on.")] = 2000,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window; windows do not overlap.")] = 512,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            help="Loss that the proposed recipe has to reach. Without it the proposal is as accurate as it gets "
            "without being slower.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        list[StepName],
        typer.Option("--step", help="Run only this step (and what it needs); repeatable."),
    ] = [],  # noqa: B006 typer needs a list
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, help="Time budget, spent on what tells most.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes that measure at once.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Measure with --jobs actors on this Ray cluster, which sees the same files (extra \\[ray]).",
            show_default=False,
        ),
    ] = None,
    work_dir: Annotated[
        Path, typer.Option("--work-dir", help="Where measurements are kept; the same command goes on from there.")
    ] = Path(".fptq-analyze"),
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Find the layers that lose accuracy or speed, say why, and propose a better recipe.

    Exit codes: 0 done (also when the budget ended early), 1 failed, 2 usage, 75 interrupted: run it again to go on.
    """
    settings = Recipe.load(recipe, overrides(assignments))
    if calibration is None:
        err.print("no --calibration: activations are observed on random tokens", style="yellow")
    try:
        analysis = run_analysis(
            model,
            output,
            text=text,
            calibration=calibration,
            tokenizer=tokenizer,
            recipe=settings,
            metric=metric,
            tokens=tokens,
            window=window,
            target=target,
            steps=[step for step in STEPS if not steps or step in {chosen.value for chosen in steps}],
            minutes=minutes,
            jobs=jobs,
            ray=ray,
            work_dir=work_dir,
            provider=provider.value,
            progress=TerminalProgress(),
        )
    except KeyboardInterrupt:
        # Every measurement is on disk when it is made, so nothing has to be finished first.
        raise StoppedError(
            "stopped", f"what was measured lies in {work_dir}", "Run the same command again to go on"
        ) from None
    if as_json:
        sys.stdout.write(analysis.to_json())
        return
    _show(analysis, output)


def _show(analysis: Analysis, output: Path) -> None:
    unit = analysis.metric["unit"]
    for name, model in (("float", analysis.baseline), ("recipe", analysis.quantized)):
        if model is not None:
            speed = "" if model.speedup is None else f", {model.speedup:.2f} times the float speed"
            out.print(f"{name:9} {model.value:.4f} {unit}{speed}", highlight=False)
    if analysis.proposal:
        speed = analysis.proposal["speedup"]
        out.print(
            f"proposal  {analysis.proposal['figures'][analysis.metric['name']]:.4f} {unit}"
            + ("" if speed is None else f", {speed:.2f} times the float speed"),
            highlight=False,
        )
    worst = [layer for layer in analysis.sensitivity if layer.metric_loss is not None][:8]
    if worst:
        table = Table(title="most sensitive layers, each quantized alone", title_justify="left")
        for heading in ("layer", "loss", "SNR dB", "of activation", "of weights", "scheme"):
            table.add_column(heading, justify="left" if heading in ("layer", "scheme") else "right")
        for layer in worst:
            table.add_row(
                layer.name,
                f"{layer.metric_loss:.4g}",
                f"{layer.snr_db:.1f}",
                f"{layer.activation_snr_db:.1f}",
                f"{layer.weight_snr_db:.1f}",
                layer.scheme,
            )
        out.print(table)
    for finding in analysis.findings:
        out.print(f"[bold]{finding.id}[/bold] {escape(finding.title)}", highlight=False)
        for sentence in finding.evidence:
            out.print(f"       {escape(sentence)}", highlight=False)
        out.print(f"       $ {escape(finding.action)}", style="cyan", highlight=False)
    for title, count in analysis.skipped.items():
        out.print(f"left out for lack of time: {count} x {title.lower()}", style="yellow", highlight=False)
    out.print(escape(f"report: {output / 'report.html'}"), highlight=False)
