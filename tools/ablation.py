#!/usr/bin/env python3
"""What each technique of a recipe is worth: one row per technique, each on top of the rows above it.

    python tools/ablation.py smollm2 --source model.onnx     # a language model: perplexity, KL, tokens per second
    python tools/ablation.py llama                           # one that `train_lm.py` trained: never quantized before
    python tools/ablation.py gpt2                            # likewise, of another family
    python tools/ablation.py minilm                          # a sentence encoder, never quantized: cosine, ranks
    python tools/ablation.py recipes --source model.onnx     # the packaged recipes on SmolLM2, on all 22,484 tokens
    python tools/ablation.py smollm2 --rows gptq mse-range   # some rows only; without it all that are still missing
    python tools/ablation.py smollm2 --record                # no measuring: write the rows found as a record

Every finished row is kept in the output folder, so that an interrupted run goes on where it stopped. Rows are for
comparison with each other: they calibrate on few windows and evaluate on few tokens (`Protocol`), which the record
states. Speed is measured with one thread as tokens per second of processor time, which neighbours disturb least.
The two trained models are made first if `train_lm.py` has not made them yet (quick with a GPU, hours without).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Run from a checkout, too, where neither package is installed.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

import assets
import numpy as np
from ablation_rows import ENCODER_ROWS, LANGUAGE_ROWS, RECIPE_ROWS, Row
from gpu_bench.records import environment, write_record
from rich.console import Console
from rich.table import Table

from fptq_onnx.calibration.tokens import encode_text, encode_windows, load_tokenizer, read_text
from fptq_onnx.convert import convert
from fptq_onnx.evaluation.compare import compare_embeddings, embed
from fptq_onnx.evaluation.language_model import LanguageModel, open_language_model
from fptq_onnx.evaluation.perplexity import evaluate
from fptq_onnx.export import export_model
from fptq_onnx.generation.generate import generate
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.progress import Progress, TerminalProgress
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report
from fptq_onnx.runtime import session

__all__ = ["Protocol", "main"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How every row of a run is measured.

    Attributes:
        calibration_windows: Windows of Brown text (calibration half) that each conversion sees; 0 for the recipe's own.
        window: Tokens per window, for calibration and evaluation.
        brown_windows: Windows of held-out Brown text: perplexity, KL and top-1 agreement.
        speech_windows: Windows of speeches, another domain: perplexity.
        sentences: Held-out texts that an encoder embeds; ranks are of the similarities of all pairs.
        sentence_tokens: Tokens of each of them.
        prompt: Tokens of the prompt before decoding is timed.
        decoded: Tokens decoded then.
    """

    calibration_windows: int = 8
    window: int = 512
    brown_windows: int = 8
    speech_windows: int = 4
    sentences: int = 160
    sentence_tokens: int = 48
    prompt: int = 128
    decoded: int = 24


_SMALL = Protocol(calibration_windows=32, brown_windows=44, speech_windows=16)
PROTOCOLS = {
    "smollm2": Protocol(),
    "recipes": Protocol(calibration_windows=0, brown_windows=44, speech_windows=44),
    "llama": _SMALL,
    "gpt2": _SMALL,
    "minilm": Protocol(),
}
ROWS = {
    "smollm2": LANGUAGE_ROWS,
    "recipes": RECIPE_ROWS,
    "llama": LANGUAGE_ROWS,
    "gpt2": LANGUAGE_ROWS,
    "minilm": ENCODER_ROWS,
}


def main() -> int:
    """Measure what is missing, print the table, write the record if asked to; returns the exit status."""
    arguments = _arguments()
    output = arguments.output / arguments.model
    rows = {row.name: row for row in ROWS[arguments.model]}
    if arguments.rows and set(arguments.rows) - rows.keys():
        print(f"no such row; there are: {', '.join(rows)}", file=sys.stderr)
        return 2
    if not arguments.record:
        source = arguments.source or _export(arguments.model, output)
        for row in rows.values():
            wanted = row.name in arguments.rows if arguments.rows else not (output / f"{row.name}.json").is_file()
            if wanted:
                _store(output / f"{row.name}.json", measure(arguments.model, row, source, output, TerminalProgress()))
    found = [figures for row in rows.values() if (figures := _load(output / f"{row.name}.json", row)) is not None]
    Console(width=200).print(_table(found))
    if arguments.record:
        head = environment()
        protocol = dataclasses.asdict(PROTOCOLS[arguments.model]) | {"cores": os.cpu_count()}
        body = {"protocol": protocol, "rows": found}
        print(write_record(f"ablation-{arguments.model}", head, body))
    return 0


def measure(model: str, row: Row, source: Path, output: Path, progress: Progress) -> dict[str, Any]:
    """Convert by the recipe of a row (or take the float model), evaluate, and return the figures."""
    print(f"{row.name}: {row.title}", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {"name": row.name, "title": row.title, "recipe": row.recipe, "changes": row.changes}
    figures |= {"source": "/".join(source.parts[-2:])} | {key: environment()[key] for key in ("created", "commit")}
    protocol, target = PROTOCOLS[model], source
    if row.recipe is not None:
        target = output / row.name / "model.onnx"
        target.parent.mkdir(parents=True, exist_ok=True)
        few = {"calibration.windows": protocol.calibration_windows, "calibration.length": protocol.window}
        recipe = Recipe.load(row.recipe, (few if protocol.calibration_windows else {}) | row.changes)
        figures["resolved"] = _resolved(row)
        wall, used = time.monotonic(), time.process_time()
        text = assets.brown_text(progress).calibration
        report = convert(
            source,
            target,
            calibration=text,
            tokenizer=source.with_name("tokenizer.json"),
            recipe=recipe,
            verify_tokens=0,
            progress=progress,
        )
        figures |= {
            "convert_seconds": round(time.monotonic() - wall, 1),
            "convert_cpu_seconds": round(time.process_time() - used, 1),
            **_summary(report),
        }
        files = sorted(target.parent.glob("model.onnx*"))
        figures["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    figures["megabytes"] = round(sum(file.stat().st_size for file in target.parent.glob("model.onnx*")) / 1e6, 1)
    judge = _judge_encoder if model == "minilm" else _judge_language
    figures |= judge(source, target, protocol, progress)
    if target != source:
        for file in target.parent.glob("model.onnx*"):
            file.unlink()
    return figures


def _summary(report: Report) -> dict[str, Any]:
    """What the report says about the activations, the refused techniques and the weights."""
    integer = [layer for layer in report.layers if layer.scheme != "float"]
    return {
        "static_share": sum("static" in layer.scheme for layer in integer) / len(integer),
        "schemes": dict(report.schemes()),
        "rotation": report.rotation,
        "gptq_kept": sum("gptq" in layer.weight_method for layer in integer),
        "quantized_layers": len(integer),
        "seconds": report.seconds,
        "peak_memory_mb": round(report.peak_memory_bytes / 1e6),
    }


def _judge_language(source: Path, target: Path, protocol: Protocol, progress: Progress) -> dict[str, Any]:
    tokenizer = load_tokenizer(source.with_name("tokenizer.json"))
    brown, speeches = (
        encode_text(tokenizer, read_text(path))
        for path in (assets.brown_text(progress).evaluation, assets.speeches(progress))
    )
    model = open_language_model(target)
    reference = None if target == source else open_language_model(source)
    predicted = protocol.window - 1
    held_out = evaluate(
        model,
        brown,
        against=reference,
        window=protocol.window,
        max_tokens=protocol.brown_windows * predicted,
        progress=progress,
    )
    other = evaluate(
        model, speeches, window=protocol.window, max_tokens=protocol.speech_windows * predicted, progress=progress
    )
    del model, reference
    return {
        "perplexity": held_out.perplexity,
        "kl_mean": held_out.kl_mean,
        "top1_agreement": held_out.top1_agreement,
        "speech_perplexity": other.perplexity,
        **_speed(target, brown, protocol),
    }


def _speed(target: Path, ids: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """Tokens per second of processor time with one thread: a window at once, and token after token."""
    model = open_language_model(target, threads=1)

    window = ids[: protocol.window]
    prefill = _fastest(lambda: model.run(window, "speed"), window.size)
    if not model.inputs.caches:
        return {"prefill_tokens_per_s": prefill}
    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": _decode(model, ids, protocol)}


def _fastest(run: Callable[[], object], tokens: int) -> float:
    times = []
    for _ in range(3):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return tokens / min(times)


def _decode(model: LanguageModel, ids: np.ndarray, protocol: Protocol) -> float:
    def run(new: int) -> float:
        started = time.process_time()
        generate(model, [ids[: protocol.prompt]], max_new_tokens=new)
        return time.process_time() - started

    run(2)
    return protocol.decoded / (min(run(protocol.decoded + 1) for _ in range(2)) - min(run(1) for _ in range(2)))


def _judge_encoder(source: Path, target: Path, protocol: Protocol, progress: Progress) -> dict[str, Any]:
    tokenizer = load_tokenizer(source.with_name("tokenizer.json"))
    result: dict[str, Any] = {}
    texts = {"": assets.brown_text(progress).evaluation, "speech_": assets.speeches(progress)}
    for prefix, path in texts.items():
        windows = encode_windows(tokenizer, read_text(path), protocol.sentence_tokens)[: protocol.sentences]
        embeddings = []
        for file in (source, target):
            inputs = describe_inputs(load_model(file))
            batches = [{inputs.token_input.name: windows[i : i + 16]} for i in range(0, len(windows), 16)]  # type: ignore[union-attr]
            embeddings.append(embed(session(file), inputs, batches))
        agreement = dataclasses.asdict(compare_embeddings(*embeddings))
        result |= {f"{prefix}{key}": value for key, value in agreement.items()}
    inputs = describe_inputs(load_model(target))
    one = session(target, threads=1)
    tokens = sum(int(ids.size) for batch in batches[:4] for ids in batch.values())
    result["prefill_tokens_per_s"] = _fastest(lambda: embed(one, inputs, batches[:4]), tokens)
    return result


def _export(model: str, output: Path) -> Path:
    path = output / "float" / "model.onnx"
    if not path.is_file():
        given = {"smollm2": assets.smollm2, "recipes": assets.smollm2, "minilm": assets.minilm}
        folder = given[model]() if model in given else _trained(model)
        export_model(folder, path.parent, progress=TerminalProgress())
    return path


def _trained(architecture: str) -> Path:
    """A model that `train_lm.py` made, now or before."""
    folder = assets.cache_dir() / "trained" / architecture
    if not (folder / "training.json").is_file():
        script = Path(__file__).with_name("train_lm.py")
        subprocess.run([sys.executable, str(script), architecture, str(folder)], check=True)
    return folder


def _store(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _load(path: Path, row: Row) -> dict[str, Any] | None:
    """The figures kept of a row; None if there are none, or none of the recipe that the row stands for now."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A packaged recipe may have changed; fields that it has gained since stand for what was done before.
    before, now = figures.pop("resolved", {}), _resolved(row)
    if figures and (figures["changes"] != row.changes or before != {name: now.get(name) for name in before}):
        print(f"{row.name}: measured with another recipe, left out: measure it again", file=sys.stderr)
        return None
    return figures | {"title": row.title} if figures else None


def _resolved(row: Row) -> dict[str, Any]:
    """Every field of a row's recipe by its dotted name; none for the float model."""
    sections = {} if row.recipe is None else Recipe.load(row.recipe, row.changes).resolved()
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    names = ["perplexity", "kl_mean", "top1_agreement", "speech_perplexity", "cosine_mean", "cosine_min", "spearman"]
    names += ["static_share", "convert_cpu_seconds", "megabytes", "prefill_tokens_per_s", "decode_tokens_per_s"]
    shown = [name for name in names if any(row.get(name) is not None for row in rows)]
    for name in ("row", *shown):
        table.add_column(name)
    for row in rows:
        cells = (row.get(name) for name in shown)
        table.add_row(row["title"], *("-" if cell is None else f"{cell:.4g}" for cell in cells))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=ROWS)
    parser.add_argument("--source", type=Path, help="an export that is there already, tokenizer.json beside it")
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows to measure again")
    parser.add_argument("--record", action="store_true", help="write tools/records/ from the rows found")
    parser.add_argument("--output", type=Path, default=assets.cache_dir() / "ablation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
