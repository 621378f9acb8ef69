"""`fptq-onnx bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fptq_onnx.benchmark.benchmark import benchmark
from fptq_onnx.benchmark.results import Settings
from fptq_onnx.benchmark.show import show
from fptq_onnx.cli.common import AsJson, OnProvider, Provider, Threads, app, out, print_json, reporting_errors
from fptq_onnx.progress import TerminalProgress

__all__ = ["bench"]


@app.command()
@reporting_errors
def bench(
    model: Annotated[Path, typer.Argument(help="ONNX model, or a folder that holds one.", show_default=False)],
    against: Annotated[
        list[Path],
        typer.Option("--against", help="Model to compare with, such as the float one; repeatable."),
    ] = [],  # noqa: B006 typer needs a list
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Prompt lengths. \\[default: 128,512 or what fits]", show_default=False),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option("--batches", help="Sequences that run together. \\[default: 1]", show_default=False),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=0, help="Decode steps after each prompt.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed runs of each case and model.")] = 5,
    threads: Threads = None,
    library: Annotated[
        bool, typer.Option("--library/--no-library", help="Use the op library, or time the function bodies.")
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Also show where the time of the smallest case goes.")
    ] = True,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Prefill and decode speed, memory, and the kernel of every layer."""
    settings = Settings(
        lengths=_sizes(lengths, "--lengths"),
        batches=_sizes(batches, "--batches"),
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        provider=provider.value,
        library=library,
        profile=profile,
    )
    report = benchmark(model, against, settings=settings, progress=TerminalProgress())
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        show(report, out)


def _sizes(text: str | None, option: str) -> tuple[int, ...] | None:
    """Parse "128,512"."""
    if text is None:
        return None
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 128,512", param_hint=option)
    return sizes
