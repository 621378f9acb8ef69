"""`fptq-onnx generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fptq_onnx.calibration.tokens import decode_continuation, encode_text, find_tokenizer, load_tokenizer
from fptq_onnx.cli.common import (
    AsJson,
    OnProvider,
    Provider,
    Threads,
    TokenizerPath,
    app,
    err,
    out,
    print_json,
    reporting_errors,
)
from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.generate import find_model, stop_tokens
from fptq_onnx.generation.generate import generate as generate_greedily

__all__ = ["generate"]


@app.command()
@reporting_errors
def generate(
    model: Annotated[
        Path, typer.Argument(help="ONNX decoder with key/value cache, or its folder.", show_default=False)
    ],
    prompts: Annotated[
        list[str], typer.Option("--prompt", help="Text to continue; repeatable, prompts run as one batch.")
    ] = [],  # noqa: B006 typer needs a list
    prompt_ids: Annotated[
        list[str],
        typer.Option("--prompt-ids", metavar="ID,ID,...", help="Token ids to continue, without a tokenizer."),
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to add.")] = 64,
    ignore_stop: Annotated[
        bool, typer.Option("--ignore-stop", help="Go on after the end-of-text token of the model's configuration.")
    ] = False,
    tokenizer: TokenizerPath = None,
    library: Annotated[
        bool, typer.Option("--library/--no-library", help="Kernels of the op library, or the function bodies.")
    ] = True,
    threads: Threads = None,
    provider: OnProvider = Provider.CPU,
    as_json: AsJson = False,
) -> None:
    """Continue prompts greedily, with the key/value cache on the device."""
    if bool(prompts) == bool(prompt_ids):
        raise typer.BadParameter("give --prompt or --prompt-ids (one kind, each repeatable)")
    ids = [_parse(text) for text in prompt_ids]
    file = find_model(model)
    found = tokenizer or find_tokenizer(file)
    coder = None if found is None else load_tokenizer(found)
    if prompts:
        if coder is None:
            raise CalibrationError(
                str(file), "there is no tokenizer.json beside it", "Give one with --tokenizer, or use --prompt-ids"
            )
        ids = [encode_text(coder, prompt, "prompt").tolist() for prompt in prompts]
    opened = open_language_model(file, provider.value, register_library=None if library else False, threads=threads)
    made = generate_greedily(
        opened, ids, max_new_tokens=max_new_tokens, stop=() if ignore_stop else stop_tokens(file.parent)
    )
    texts = [
        None if coder is None else decode_continuation(coder, given, new)
        for given, new in zip(ids, made.token_ids, strict=True)
    ]
    per_second = {
        "prefill_tokens_per_second": made.prefill_tokens / made.prefill_seconds,
        "decode_tokens_per_second": len(ids) * made.decode_steps / made.decode_seconds if made.decode_steps else None,
    }
    if as_json:
        rows = zip(ids, made.token_ids, texts, strict=True)
        sequences = [{"prompt_ids": given, "token_ids": new, "text": text} for given, new, text in rows]
        print_json(
            {"model": str(file), "sequences": sequences, "seconds_to_first_token": made.prefill_seconds} | per_second
        )
        return
    for index, (new, text) in enumerate(zip(made.token_ids, texts, strict=True)):
        start = prompts[index] if prompts else ""
        out.print(escape(f"{start}{text}" if text is not None else " ".join(map(str, new))), highlight=False)
    speed = ", ".join(f"{name.split('_')[0]} {value:.0f}" for name, value in per_second.items() if value is not None)
    err.print(f"{speed} tokens/s", highlight=False)


def _parse(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"--prompt-ids {text!r} is not a list of integers such as 1,2,3") from None
