"""`fptq-onnx convert`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import fptq_onnx
from fptq_onnx.cli.common import (
    AsJson,
    Assignments,
    CalibrationPath,
    OnProvider,
    Provider,
    Threads,
    TokenizerPath,
    app,
    err,
    out,
    overrides,
    reporting_errors,
    stop_on_interrupt,
)
from fptq_onnx.errors import VerificationError
from fptq_onnx.progress import TerminalProgress
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report, show

__all__ = ["convert"]


class OutputFormat(StrEnum):
    """How quantized layers are written into the graph."""

    CUSTOM = "custom"
    MATMULNBITS = "matmulnbits"
    QDQ = "qdq"


@app.command()
@reporting_errors
def convert(
    model: Annotated[
        Path, typer.Argument(help="Float ONNX model, or a model folder of onnxruntime-genai.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Quantized model or folder. \\[default: MODEL.fptq.onnx]", show_default=False
        ),
    ] = None,
    calibration: CalibrationPath = None,
    tokenizer: TokenizerPath = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="balanced, accurate, paper, or the path of a YAML file.")
    ] = "balanced",
    assignments: Assignments = [],  # noqa: B006 typer needs a list
    output_format: Annotated[
        OutputFormat,
        typer.Option(
            "--format",
            help="custom: integer op of this package. matmulnbits: onnxruntime's int4 op, float activations. "
            "qdq: simulation in standard operators.",
        ),
    ] = OutputFormat.CUSTOM,
    exclude: Annotated[
        list[str],
        typer.Option("--exclude", metavar="REGEX", help="Keep matching layers (label or node name) float; repeatable."),
    ] = [],  # noqa: B006 typer needs a list
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="Edited plan from --dry-run to carry out: its choices replace --exclude and the recipe's.",
            show_default=False,
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse",
            help="Faster steps around the layers: one op for a norm or SiLU and the quantization behind it, one for "
            "another per-token quantization and the layer that reads it, and this package's attention in float32 "
            "graphs of onnxruntime-genai.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Calibrate, write OUTPUT's .plan.json and stop.")] = False,
    verify_tokens: Annotated[
        int, typer.Option("--verify-tokens", min=0, help="Tokens to compare with the float model; 0 skips it.")
    ] = 2048,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Exit 3 if the mean KL from the float model is larger.", show_default=False),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            help="Keep finished blocks here: after Ctrl-C (exit code 75), a crash or a kill the same command goes on. "
            "Removed when the conversion is done.",
            show_default=False,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="Memory to plan with, such as 8GiB: above it hidden states and results go to disk and the "
            "verification runs block by block. \\[default: 4/5 of what is free]",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    float_layers: Annotated[
        int, typer.Option("--float-layers", metavar="N", min=0, help="Keep the N layers that err most float.")
    ] = 0,
    fall_back: Annotated[
        int,
        typer.Option(
            "--fall-back",
            metavar="ROUNDS",
            min=0,
            help="Convert again up to this often with layers on per-token scales, int8 weights or float, worst first, "
            "until --max-kl is met.",
        ),
    ] = 0,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Calibrate, plan, quantize, verify and save a W4A8 model."""
    settings = Recipe.load(recipe, overrides(assignments))
    budget = {"fallback.float_layers": float_layers, "fallback.rounds": fall_back}
    settings = settings.with_overrides({name: value for name, value in budget.items() if value})
    if calibration is None:
        err.print("no --calibration: calibrating data-free on random tokens", style="yellow")
    try:
        with stop_on_interrupt(work_dir is not None) as stop:
            report = fptq_onnx.convert(
                model,
                output,
                calibration=calibration,
                tokenizer=tokenizer,
                recipe=settings,
                output_format=output_format.value,
                exclude=exclude,
                plan=plan,
                fuse=fuse,
                dry_run=dry_run,
                verify_tokens=verify_tokens,
                max_kl=max_kl,
                provider=provider.value,
                threads=threads,
                max_memory=max_memory,
                work_dir=work_dir,
                stop=stop,
                progress=TerminalProgress(),
            )
    except VerificationError as error:
        if isinstance(error.report, Report):
            _print_report(error.report, as_json)
        raise
    _print_report(report, as_json)


def _print_report(report: Report, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        show(report, out)
