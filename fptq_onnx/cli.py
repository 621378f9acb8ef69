"""The command line: each command parses its arguments, calls the Python API and prints what came back."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

import fptq_onnx
from fptq_onnx.calibration.tokens import encode_text, find_tokenizer, load_tokenizer, read_text
from fptq_onnx.errors import CalibrationError, FptqError, VerificationError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.evaluation.perplexity import evaluate as evaluate_perplexity
from fptq_onnx.progress import TerminalProgress
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report, show

__all__ = ["app", "main"]

P = ParamSpec("P")

EXIT_FAILED = 1
EXIT_VERIFICATION = 3

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


class OutputFormat(StrEnum):
    """How quantized layers are written into the graph."""

    CUSTOM = "custom"
    MATMULNBITS = "matmulnbits"
    QDQ = "qdq"


class FloatType(StrEnum):
    """Float type of an exported model."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; progress and logs go to stderr.")
]
OnProvider = Annotated[Provider, typer.Option("--provider", help="Execution provider of the sessions.")]
TokenizerPath = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="tokenizer.json; by default the one beside the model.", show_default=False),
]


def _reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the package's errors into one line on stderr and the documented exit codes."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FptqError as error:
            err.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
            raise typer.Exit(EXIT_VERIFICATION if isinstance(error, VerificationError) else EXIT_FAILED) from None

    return run


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
    handler = RichHandler(console=err, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _overrides(assignments: list[str]) -> dict[str, Any]:
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


@app.command()
@_reporting_errors
def convert(
    model: Annotated[Path, typer.Argument(help="Float ONNX model.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Quantized model. \\[default: MODEL.fptq.onnx]", show_default=False),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Text (.txt) or feeds (.npz). Without it random tokens are used and the report says so.",
            show_default=False,
        ),
    ] = None,
    tokenizer: TokenizerPath = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="balanced, accurate, paper, or the path of a YAML file.")
    ] = "balanced",
    assignments: Annotated[
        list[str],
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe; repeatable."),
    ] = [],  # noqa: B006 typer needs a list
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
        Path | None, typer.Option("--plan", help="Edited plan from --dry-run to carry out.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Calibrate, write OUTPUT's .plan.json and stop.")] = False,
    verify_tokens: Annotated[
        int, typer.Option("--verify-tokens", min=0, help="Tokens to compare with the float model; 0 skips it.")
    ] = 2048,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Exit 3 if the mean KL from the float model is larger.", show_default=False),
    ] = None,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Calibrate, plan, quantize, verify and save a W4A8 model."""
    settings = Recipe.load(recipe, _overrides(assignments))
    if calibration is None:
        err.print("no --calibration: calibrating data-free on random tokens", style="yellow")
    try:
        report = fptq_onnx.convert(
            model,
            output,
            calibration=calibration,
            tokenizer=tokenizer,
            recipe=settings,
            output_format=output_format.value,
            exclude=exclude,
            plan=plan,
            dry_run=dry_run,
            verify_tokens=verify_tokens,
            max_kl=max_kl,
            provider=provider.value,
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


@app.command()
@_reporting_errors
def evaluate(
    model: Annotated[Path, typer.Argument(help="ONNX causal language model, float or quantized.", show_default=False)],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text to score.", show_default=False)],
    tokenizer: TokenizerPath = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window; windows do not overlap.")] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Stop after this many predicted tokens.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Float model: adds mean KL and top-1 agreement.", show_default=False),
    ] = None,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a text, and the distance from a float model."""
    found = tokenizer or find_tokenizer(model)
    if found is None:
        raise CalibrationError(str(model), "there is no tokenizer.json beside it", "Give one with --tokenizer")
    token_ids = encode_text(load_tokenizer(found), read_text(text), str(text))
    result = evaluate_perplexity(
        open_language_model(model, provider.value),
        token_ids,
        against=None if against is None else open_language_model(against, provider.value),
        window=window,
        max_tokens=max_tokens,
        progress=TerminalProgress(),
    )
    if as_json:
        _print_json(dataclasses.asdict(result))
        return
    out.print(f"perplexity      {result.perplexity:.3f}  ({result.tokens} tokens, windows of {window})")
    if result.kl_mean is not None and result.top1_agreement is not None:
        out.print(f"mean KL         {result.kl_mean:.4f} nats per token")
        out.print(f"top-1 agreement {result.top1_agreement:.1%}")
        out.print(f"float model     {result.reference_perplexity:.3f}")
    out.print(f"speed           {result.tokens_per_second:.0f} tokens/s")


@app.command()
@_reporting_errors
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
        _print_json({key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(result).items()})
    else:
        out.print(escape(f"{model_dir} -> {result.path}"), highlight=False)


def main() -> None:
    """Run the command line; the entry point of `fptq-onnx`."""
    app()
