"""`fptq-onnx package`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fptq_onnx.cli.common import AsJson, OnProvider, Provider, Threads, app, err, out, print_json, reporting_errors
from fptq_onnx.packaging.triton import SERVED_FROM, package_triton
from fptq_onnx.packaging.triton_config import TritonOptions

__all__ = ["package"]


@app.command()
@reporting_errors
def package(
    model: Annotated[Path, typer.Argument(help="ONNX model, or a folder that holds one.", show_default=False)],
    triton: Annotated[
        Path, typer.Option("--triton", help="Triton model repository to add the model to.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the model; by default from the file or its folder.", show_default=False),
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", min=0, help="Requests that the server may join; 0 for none.")
    ] = 8,
    queue_delay: Annotated[
        int, typer.Option("--queue-delay", min=0, help="Microseconds that a request may wait for others.")
    ] = 100,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Sessions per CPU or GPU.")] = 1,
    threads: Threads = None,
    served_from: Annotated[
        str, typer.Option("--served-from", help="Absolute path at which the server sees the repository.")
    ] = SERVED_FROM,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Write a model, its data and the op library into a Triton model repository."""
    options = TritonOptions(provider.value, instances, max_batch_size, queue_delay, threads)
    written = package_triton(model, triton, name=name, options=options, served_from=served_from)
    if written.unbatched_reason is not None:
        err.print(f"no batching: {escape(written.unbatched_reason)}", style="yellow")
    if not written.schema_checked:
        err.print(
            escape("config.pbtxt was not checked against Triton's schema: pip install 'fptq-onnx[triton]'"),
            style="yellow",
        )
    if as_json:
        print_json(dataclasses.asdict(written) | {"repository": str(written.repository)})
        return
    for file in written.files:
        out.print(escape(file), highlight=False)
    out.print(
        f"serve it (onnxruntime of the image must be 1.23 or newer):\n{escape(written.server_command)}", highlight=False
    )
