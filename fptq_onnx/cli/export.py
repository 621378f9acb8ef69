"""`fptq-onnx export`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fptq_onnx.cli.common import AsJson, app, out, print_json, reporting_errors
from fptq_onnx.progress import TerminalProgress

__all__ = ["export"]


class FloatType(StrEnum):
    """Float type of an exported model."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@app.command()
@reporting_errors
def export(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model directory.", show_default=False)],
    out_dir: Annotated[Path, typer.Argument(help="Folder for model.onnx and tokenizer files.", show_default=False)],
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache/--no-kv-cache", help="With past and present key-value inputs and outputs.")
    ] = True,
    dtype: Annotated[FloatType, typer.Option("--dtype", help="Float type of the weights.")] = FloatType.FLOAT32,
    as_json: AsJson = False,
) -> None:
    r"""Export a Hugging Face model to ONNX (needs the extra \[export])."""
    from fptq_onnx.export import export_model  # torch takes seconds to import

    result = export_model(model_dir, out_dir, kv_cache=kv_cache, dtype=dtype.value, progress=TerminalProgress())
    if as_json:
        print_json({key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(result).items()})
    else:
        out.print(escape(f"{model_dir} -> {result.path}"), highlight=False)
