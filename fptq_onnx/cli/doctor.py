"""`fptq-onnx doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fptq_onnx.cli.common import AsJson, OnProvider, Provider, app, out, print_json, reporting_errors
from fptq_onnx.doctor.diagnose import diagnose
from fptq_onnx.doctor.findings import Diagnosis, Status

__all__ = ["doctor"]

_STYLES = {Status.OK: "green", Status.NOTE: "cyan", Status.WARNING: "yellow", Status.BROKEN: "bold red"}


@app.command()
@reporting_errors
def doctor(
    model: Annotated[
        Path | None, typer.Argument(help="ONNX model to try, or a folder that holds one.", show_default=False)
    ] = None,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """What is installed and can run here, whether a model loads, and the fix for each problem; exit 1 if broken."""
    diagnosis = diagnose(model, provider.value)
    if as_json:
        print_json({"ok": not diagnosis.broken, **dataclasses.asdict(diagnosis)})
    else:
        _show(diagnosis)
    if diagnosis.broken:
        raise typer.Exit(1)


def _show(diagnosis: Diagnosis) -> None:
    width = max(len(finding.check) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        style = _STYLES[finding.status]
        out.print(
            f"[{style}]{finding.status.value:<8}[/] {finding.check:<{width}}  {escape(finding.detail)}", highlight=False
        )
        if finding.fix is not None:
            out.print(f"{'':<{9 + width}}  fix: {escape(finding.fix)}", highlight=False)
