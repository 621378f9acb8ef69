"""What the commands share: the application, the two consoles, common options, errors and exit codes."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

import fptq_onnx
from fptq_onnx.errors import FptqError, StoppedError, VerificationError

__all__ = [
    "AsJson",
    "Assignments",
    "CalibrationPath",
    "OnProvider",
    "Provider",
    "Threads",
    "TokenizerPath",
    "app",
    "err",
    "out",
    "overrides",
    "print_json",
    "reporting_errors",
    "stop_on_interrupt",
]

P = ParamSpec("P")

EXIT_FAILED = 1
EXIT_VERIFICATION = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on

app = typer.Typer(
    help="Quantize ONNX transformers to W4A8 (FPTQ) and run them with integer kernels in onnxruntime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Tables in a log or a pipe are not broken at 80 columns.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, soft_wrap=True)


class Provider(StrEnum):
    """Where sessions run."""

    CPU = "cpu"
    CUDA = "cuda"


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; progress and logs go to stderr.")
]
Assignments = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe; repeatable.")
]
CalibrationPath = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text (.txt) or feeds (.npz) to observe activations on. Without it random tokens are used.",
        show_default=False,
    ),
]
OnProvider = Annotated[Provider, typer.Option("--provider", help="Execution provider of the sessions.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Intra-op threads of a session.", show_default=False)
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="tokenizer.json; by default the one beside the model.", show_default=False),
]


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the package's errors into one line on stderr and the documented exit codes."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except StoppedError as error:
            err.print(escape(str(error)), highlight=False)
            raise typer.Exit(EXIT_STOPPED) from None
        except FptqError as error:
            err.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
            raise typer.Exit(EXIT_VERIFICATION if isinstance(error, VerificationError) else EXIT_FAILED) from None

    return run


@contextmanager
def stop_on_interrupt(resumable: bool) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask for a stop instead of ending the process; the second ends it as ever.

    Args:
        resumable: Whether the work can be taken up again; if not, Ctrl-C does what it always does.

    Yields:
        Whether a stop was asked for.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        print("stopping when this block is done; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    if not resumable:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(fptq_onnx.__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every decision to stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # Rich breaks lines at 80 columns where there is no terminal.
    bright = RichHandler(console=err, show_path=False, show_time=False) if err.is_terminal else None
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s" if bright else "%(levelname)s %(message)s",
        handlers=[bright or logging.StreamHandler()],
    )


def print_json(value: Any) -> None:
    """Write `value` to stdout as one JSON object."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def overrides(assignments: list[str]) -> dict[str, Any]:
    """Parse `weights.grid=signed8` options; values are YAML, so numbers, booleans and lists work."""
    parsed = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"{assignment!r} is not FIELD=VALUE, such as weights.grid=signed8")
        try:
            parsed[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"the value of {assignment!r} is not YAML") from None
    return parsed
