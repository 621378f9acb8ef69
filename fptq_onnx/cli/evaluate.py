"""`fptq-onnx evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fptq_onnx.calibration.tokens import encode_text, find_tokenizer, load_tokenizer, read_text
from fptq_onnx.cli.common import AsJson, OnProvider, Provider, TokenizerPath, app, out, print_json, reporting_errors
from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.evaluation.perplexity import evaluate as evaluate_perplexity
from fptq_onnx.generation.generate import find_model
from fptq_onnx.progress import TerminalProgress

__all__ = ["evaluate"]


@app.command()
@reporting_errors
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="ONNX causal language model, float or quantized, or its folder.", show_default=False)
    ],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text to score.", show_default=False)],
    tokenizer: TokenizerPath = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window; windows do not overlap.")] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help="At most this many predicted tokens, in whole windows (one at least).",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", help="Float model or its folder: adds mean KL and top-1 agreement.", show_default=False
        ),
    ] = None,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a text, and the distance from a float model."""
    file = find_model(model)
    found = tokenizer or find_tokenizer(file)
    if found is None:
        raise CalibrationError(str(file), "there is no tokenizer.json beside it", "Give one with --tokenizer")
    token_ids = encode_text(load_tokenizer(found), read_text(text), str(text))
    opened = open_language_model(file, provider.value)
    result = evaluate_perplexity(
        opened,
        token_ids,
        against=None if against is None else open_language_model(find_model(against), provider.value),
        window=window,
        max_tokens=max_tokens,
        text=str(text),
        progress=TerminalProgress(),
    )
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    used = opened.inputs.window(window)  # what the model takes may be shorter
    out.print(f"perplexity      {result.perplexity:.3f}  ({result.tokens} tokens, windows of {used})")
    if result.kl_mean is not None and result.top1_agreement is not None:
        out.print(f"mean KL         {result.kl_mean:.4f} nats per token")
        out.print(f"top-1 agreement {result.top1_agreement:.1%}")
        out.print(f"float model     {result.reference_perplexity:.3f}")
    out.print(f"speed           {result.tokens_per_second:.0f} tokens/s")
