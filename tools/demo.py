"""The whole way with a real language model: fetch, export, convert, compare on held-out text.

    python tools/demo.py            # `make demo`; everything lands in ./demo
    python tools/demo.py --fresh    # export again instead of reusing the last export

SmolLM2-135M-Instruct is exported with its key/value cache and converted with the recipe of the FPTQ paper (on the int4
grid -8..7), and once more with the default recipe. onnxruntime's own quantizers get the same float model and the same
calibration text. All are judged on text of the Brown corpus that none of them has seen. The table is also written to
demo/results.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fptq_onnx import Recipe, __version__, convert
from fptq_onnx.calibration.tokens import encode_text, load_tokenizer, read_text, token_windows
from fptq_onnx.errors import FptqError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.evaluation.perplexity import evaluate
from fptq_onnx.export import export_model
from fptq_onnx.progress import Progress, TerminalProgress
from fptq_onnx.report import Stopwatch, show, versions
from tools import assets, baselines

WINDOW = 512
# 44 windows judge perplexity; the distance to the float model needs both models at once and settles on fewer.
PERPLEXITY_TOKENS, DIVERGENCE_TOKENS = 44 * (WINDOW - 1), 8 * (WINDOW - 1)
STATIC_INT8_WINDOWS = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        model: What it is.
        path: Its file.
        perplexity: On the held-out text.
        kl_mean: Mean KL(float || model) in nats per token; None for the float model itself.
        top1_agreement: Share of positions with the float model's most likely token; None for the float model itself.
        megabytes: Model file and external data, 10^6 bytes.
        tokens_per_second: Windows of 512 tokens run one after another, all logits, as many threads as cores.
    """

    model: str
    path: str
    perplexity: float
    kl_mean: float | None
    top1_agreement: float | None
    megabytes: float
    tokens_per_second: float


def main() -> int:
    """Run the demo; 0 when every step worked, 1 with a message otherwise."""
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        run(arguments.output, arguments.fresh, console)
    except FptqError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        return 1
    return 0


def run(output: Path, fresh: bool, console: Console) -> None:
    """Do all steps, print the table and write it to `output`/results.json."""
    for name in ("fptq_onnx", "onnx_ir"):  # torch's exporter turns their information messages on
        logging.getLogger(name).setLevel(logging.WARNING)
    progress, watch = TerminalProgress(), Stopwatch()
    with watch.stage("fetch"):
        checkpoint = assets.smollm2(progress)
        text = assets.brown_text(progress)
    with watch.stage("export"):
        source = _export(checkpoint, output / "smollm2", fresh, progress, console)

    models = {"float32": source}
    for label, name, folder, changes in (
        ("FPTQ W4A8, paper, int4 grid -8..7", "paper", "smollm2-paper", {"weights.grid": "signed8"}),
        ("fptq-onnx W4A8, balanced", "balanced", "smollm2-balanced", {}),
    ):
        models[label] = output / folder / "model.onnx"
        models[label].parent.mkdir(parents=True, exist_ok=True)
        console.print(f"[bold]{label}[/bold]")
        with watch.stage(f"convert: {label}"):
            recipe = Recipe.load(name, changes)
            report = convert(source, models[label], calibration=text.calibration, recipe=recipe, progress=progress)
        show(report, console)

    tokenizer = load_tokenizer(source.with_name("tokenizer.json"))
    models["onnxruntime MatMulNBits int4, block 128, accuracy level 4"] = output / "smollm2-matmulnbits" / "model.onnx"
    static_label = "onnxruntime static int8 (QDQ of MatMul and Gemm, uint8 activations)"
    models[static_label] = output / "smollm2-static-int8" / "model.onnx"
    _, _, _, nbits, static = models.values()
    with watch.stage("onnxruntime's quantizers"):
        with progress.stage("Quantizing with onnxruntime, MatMulNBits"):
            baselines.quantize_matmulnbits(source, nbits)
        windows = token_windows(encode_text(tokenizer, read_text(text.calibration)), WINDOW)[:STATIC_INT8_WINDOWS]
        with progress.stage("Quantizing with onnxruntime, static int8", len(windows)) as advance:
            baselines.quantize_static_int8(source, static, windows, advance)

    token_ids = encode_text(tokenizer, read_text(text.evaluation))
    rows = []
    for label, path in models.items():
        console.print(f"[bold]{label}[/bold]")
        with watch.stage(f"evaluate: {label}"):
            model = open_language_model(path)
            held_out = evaluate(model, token_ids, window=WINDOW, max_tokens=PERPLEXITY_TOKENS, progress=progress)
            kl = agreement = None
            if path is not source:
                reference = open_language_model(source)
                compared = evaluate(
                    model,
                    token_ids,
                    against=reference,
                    window=WINDOW,
                    max_tokens=DIVERGENCE_TOKENS,
                    progress=progress,
                )
                kl, agreement = compared.kl_mean, compared.top1_agreement
            megabytes = baselines.model_bytes(path) / 1e6
            rows.append(
                Row(label, str(path), held_out.perplexity, kl, agreement, megabytes, held_out.tokens_per_second)
            )
    console.print(_table(rows))
    results = output / "results.json"
    results.write_text(
        json.dumps(
            {
                "rows": [dataclasses.asdict(row) for row in rows],
                "predicted_tokens": PERPLEXITY_TOKENS,
                "window": WINDOW,
                "seconds": watch.seconds,
                "cores": os.cpu_count(),
                "versions": versions(),
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    console.print(f"{sum(watch.seconds.values()):.0f} s in all; figures in {results}")


def _export(checkpoint: Path, target: Path, fresh: bool, progress: Progress, console: Console) -> Path:
    """Export, or reuse an export that the same package versions made."""
    made_by = {"fptq-onnx": __version__} | {package: version(package) for package in ("torch", "transformers")}
    record = target / "export.json"
    if not fresh and record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_by:
        console.print(f"Reusing the export in {target} (--fresh exports again)")
        return target / "model.onnx"
    result = export_model(checkpoint, target, progress=progress)
    record.write_text(json.dumps(made_by) + "\n", encoding="utf-8")
    error = "" if result.largest_error is None else f", agrees with torch to {result.largest_error:.1g}"
    console.print(f"Exported {result.architecture} in {result.seconds:.0f} s{error}")
    return result.path


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"SmolLM2-135M-Instruct, {PERPLEXITY_TOKENS} predicted tokens of held-out Brown text")
    table.add_column("model")
    for heading in ("perplexity", "KL to float", "same top token", "MB", "tokens/s (prefill)"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.perplexity:.2f}",
            "-" if row.kl_mean is None else f"{row.kl_mean:.3f}",
            "-" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
            f"{row.megabytes:.0f}",
            f"{row.tokens_per_second:.0f}",
        )
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export, convert and compare a real language model.")
    parser.add_argument("--output", type=Path, default=assets.REPOSITORY / "demo", help="folder for all files")
    parser.add_argument("--fresh", action="store_true", help="export again instead of reusing the last export")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
