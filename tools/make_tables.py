#!/usr/bin/env python3
"""Draw the benchmark tables of README files from the newest records in tools/records/.

    python tools/make_tables.py README.md            # rewrites what stands between the markers
    python tools/make_tables.py --check README.md    # exit status 1 if a table is out of date

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one of the names in `TABLES`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_bench.records import RECORDS_DIRECTORY, load_records
from gpu_bench.tables import markdown_table

__all__ = ["TABLES", "draw", "redraw"]

MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Record = Mapping[str, Any]


def _peers(rows: Sequence[Record]) -> list[str]:
    """Names in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["us"]))


def _cell(figures: Record | None) -> str:
    if figures is None:
        return "-"
    value = figures["median_us"]
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _operators(record: Record) -> str:
    rows, names = record["rows"], _peers(record["rows"])
    chain = " -> ".join(record["protocol"]["chain"])
    table = markdown_table(
        ["M", *names], [[str(row["tokens"]), *(_cell(row["us"].get(name)) for name in names)] for row in rows]
    )
    caption = f"Microseconds per MatMul, layers {chain}, onnxruntime session with CUDA graph, quantization included."
    return f"{caption}\n\n{table}"


def _kernels(record: Record) -> str:
    rows, names = record["rows"], _peers(record["rows"])
    cells = [[row["shape"], str(row["tokens"]), *(_cell(row["us"].get(name)) for name in names)] for row in rows]
    return f"Microseconds per call, cold weights, CUDA graph.\n\n{markdown_table(['layer', 'M', *names], cells)}"


def _models(record: Record) -> str:
    labels = list(record["models"])
    cells = [
        [f"{row['phase']}, {row['batch']} x {row['tokens']}"]
        + [f"{row['tokens_per_s'][name]['median']:.0f}" if name in row["tokens_per_s"] else "-" for name in labels]
        for row in record["rows"]
    ]
    if "memory" in record["protocol"]:
        cells.append(["GPU memory, MB", *(f"{record['models'][name]['device_mb']:.0f}" for name in labels)])
    network = record["protocol"].get("network")
    what = f"Tokens per second through onnxruntime{f', {network}' if network else ''}."
    return f"{what}\n\n{markdown_table(['', *labels], cells)}"


CPU_PEERS = ("MatMul f32", "MatMulNBits b128", "DynamicQuantizeMatMul")
CPU_ROWS = (1, 8, 64, 512)  # records have more


def _cpu_kernels(record: Record) -> str:
    """Time of each peer over ours, for both kinds of scales: above 1 means that ours is faster."""
    cells = []
    for row in record["rows"]:
        if row["rows"] not in CPU_ROWS:
            continue
        times = {name: figures["median_ms"] for name, figures in row["times"].items()}
        ratios = [
            " / ".join(f"{times[peer] / times[ours]:.2f}" for ours in ("fptq", "fptq structured")) for peer in CPU_PEERS
        ]
        own = f"{times['fptq']:.3f} / {times['fptq structured']:.3f}"
        cells.append([f"{row['k']}x{row['n']}", str(row["rows"]), str(row["threads"]), own, *ratios])
    heads = ["layer", "M", "threads", "W4A8, ms", *(f"x faster than {peer}" for peer in CPU_PEERS)]
    what = "One product, activation quantization included; float scales / integer-structured scales."
    return f"{what}\n\n{markdown_table(heads, cells)}"


def _cpu_models(record: Record) -> str:
    # Rows of several records may compare with different peers.
    names = list(dict.fromkeys(name for row in record["rows"] for name in row["tokens_per_s"]))
    cells = []
    for row in record["rows"]:
        speeds = (row["tokens_per_s"].get(name) for name in names)
        cells.append([row["phase"], str(row["threads"]), *("-" if x is None else f"{x:.0f}" for x in speeds)])
    return f"Tokens per second, all logits.\n\n{markdown_table(['', 'threads', *names], cells)}"


CHOSEN = "chosen by the library"


def _is_forced(record: Record) -> bool:
    """Whether FPTQ_CPU_ISA chose the kernels."""
    return record["kind"] == "cpu-kernels" and record["machine"]["kernels"] != CHOSEN


def _draw_forced(records: Sequence[Record]) -> str:
    """The newest record of each instruction set that was forced: what an older processor of this speed would get."""
    newest = {record["machine"]["kernels"]: record for record in records if _is_forced(record)}
    cells = []
    for kernels, record in newest.items():
        row = record["rows"][0]
        layer, times = f"{row['k']}x{row['n']}", {row["rows"]: row["times"] for row in record["rows"]}
        gops = 2 * row["k"] * row["n"] / 1e6
        figures = {m: times[m]["fptq structured"]["median_ms"] for m in CPU_ROWS if m in times}
        shown = [f"{figures[m]:.3f} ({gops * m / figures[m]:.0f})" if m in figures else "-" for m in CPU_ROWS]
        cells.append([kernels, layer, *shown, f"[record](tools/records/{record['file']})"])
    heads = ["FPTQ_CPU_ISA", "layer", *(f"M={m}, ms (GOP/s)" for m in CPU_ROWS), ""]
    return f"One thread, integer-structured scales.\n\n{markdown_table(heads, cells)}\n"


CPU_TABLES: dict[str, Callable[[Record], str]] = {"cpu-kernels": _cpu_kernels, "cpu-models": _cpu_models}


def _draw_cpu(name: str, records: Sequence[Record]) -> str:
    """One table for each processor that records of the kind exist for, of the newest rows for each thread count."""
    newest: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["kind"] == name and not _is_forced(record):
            by_threads = newest.setdefault(record["machine"]["cpu"], {})
            by_threads.update(dict.fromkeys((row["threads"] for row in record["rows"]), record))
    if not newest:
        raise KeyError(f"no record of kind '{name}' in {RECORDS_DIRECTORY.name}/")
    parts = []
    for cpu, by_threads in newest.items():
        rows = [row for threads, record in by_threads.items() for row in record["rows"] if row["threads"] == threads]
        sources = {record["file"]: record for record in by_threads.values()}
        machine = next(reversed(sources.values()))["machine"]
        dates = ", ".join(
            f"{record['created'][:10]} ([record](tools/records/{file}))" for file, record in sources.items()
        )
        parts.append(
            f"{CPU_TABLES[name]({'rows': rows})}\n\n{cpu} ({', '.join(machine['vector_sets'])}), onnxruntime "
            f"{machine['versions']['onnxruntime']}, {dates}\n"
        )
    return "\n".join(parts)


# Key of a row, heading, and format.
ABLATION_COLUMNS = (
    ("perplexity", "Brown", "{:.2f}"),
    ("kl_mean", "KL", "{:.3f}"),
    ("speech_perplexity", "speeches", "{:.2f}"),
    ("cosine_mean", "cosine", "{:.4f}"),
    ("spearman", "ranks", "{:.4f}"),
    ("speech_cosine_mean", "cosine, speeches", "{:.4f}"),
    ("static_share", "static", "{:.0%}"),
    ("convert_cpu_seconds", "convert, CPU s", "{:.0f}"),
    ("megabytes", "MB", "{:.0f}"),
    ("prefill_tokens_per_s", "prefill", "{:.0f}"),
    ("decode_tokens_per_s", "decode", "{:.1f}"),
)


def _draw_ablation(kind: str, records: Sequence[Record]) -> str:
    """One row per technique, from the newest record."""
    of_kind = [record for record in records if record["kind"] == kind]
    if not of_kind:
        raise KeyError(f"no record of kind '{kind}' in {RECORDS_DIRECTORY.name}/")
    record = of_kind[-1]
    rows, protocol = record["rows"], record["protocol"]
    shown = [column for column in ABLATION_COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = [
        [row["title"], *(form.format(row[key]) if row.get(key) is not None else "-" for key, _, form in shown)]
        for row in rows
    ]
    if "perplexity" in {key for key, _, _ in shown}:
        judged = (
            f"perplexity on {protocol['brown_windows']} held-out windows of Brown text and "
            f"{protocol['speech_windows']} of speeches, {protocol['window']} tokens each; tokens per second of "
            "processor time with one thread"
        )
    else:
        judged = (
            f"{protocol['sentences']} held-out texts of {protocol['sentence_tokens']} tokens: cosine similarity to the "
            "float model's embedding, rank correlation of the similarities of all pairs; tokens per second of "
            "processor time with one thread, 16 texts at a time"
        )
    count = protocol["calibration_windows"]
    data = f"{count} windows of {protocol['window']} tokens" if count else "the windows that each recipe asks for"
    what = f"Calibrated on {data}; {judged}."
    source = (
        f"onnxruntime {record['versions'].get('onnxruntime', '-')}, {record['created'][:10]} "
        f"([record](tools/records/{record['file']}))"
    )
    return f"{what}\n\n{markdown_table(['', *(heading for _, heading, _ in shown)], cells)}\n\n{source}\n"


TABLES: dict[str, Callable[[Record], str]] = {
    "gpu-operators": _operators,
    "gpu-operators-quick": _operators,
    "gpu-kernels": _kernels,
    "gpu-kernels-quick": _kernels,
    "gpu-models": _models,
}


def _draw_models(records: Sequence[Record]) -> str:
    """A table of each network that was measured on the day and the device of the newest record."""
    of_kind = [record for record in records if record["kind"] == "gpu-models"]
    if not of_kind:
        raise KeyError(f"no record of kind 'gpu-models' in {RECORDS_DIRECTORY.name}/")

    def occasion(record: Record) -> tuple[str, str]:
        return record["created"][:10], record["gpu"].get("name", "")

    newest = {
        record["protocol"].get("network"): record for record in of_kind if occasion(record) == occasion(of_kind[-1])
    }
    return "\n".join(f"{_models(record)}\n\n{_source(record)}\n" for record in newest.values())


def _source(record: Record) -> str:
    """The line below a table of a GPU: where its figures come from."""
    gpu, versions = record["gpu"], record["versions"]
    return (
        f"{gpu.get('name', 'unknown GPU')}, driver {gpu.get('driver', '?')}, onnxruntime "
        f"{versions.get('onnxruntime', '-')}, torch {versions.get('torch', '-')}, {record['created'][:10]}; median of "
        f"{record['protocol']['rounds']} rounds ([record](tools/records/{record['file']}))"
    )


def draw(name: str, records: Sequence[Record]) -> str:
    """The table of one name from the newest record of that kind, with a line on where the figures come from.

    Benchmarks of kernels may have been run shape by shape: rows of older records of the same commit come along, unless
    the newest record measured the same shapes.

    Raises:
        KeyError: There is no such table or no such record; the message says which.
    """
    if name in CPU_TABLES:
        return _draw_cpu(name, records)
    if name == "cpu-instruction-sets":
        return _draw_forced(records)
    if name == "gpu-models":
        return _draw_models(records)
    if name.startswith("ablation-"):
        return _draw_ablation(name, records)
    if name not in TABLES:
        raise KeyError(f"no table is called '{name}'; there are: {', '.join(TABLES)}")
    of_kind = [record for record in records if record["kind"] == name]
    if not of_kind:
        raise KeyError(f"no record of kind '{name}' in {RECORDS_DIRECTORY.name}/")
    record = of_kind[-1]
    rows: list[Record] = []
    for other in reversed([other for other in of_kind if other["commit"] == record["commit"]]):
        measured = {row.get("shape") for row in rows}
        rows = [*(row for row in other["rows"] if not rows or row.get("shape") not in measured), *rows]
    record = {**record, "rows": rows}
    return f"{TABLES[name](record)}\n\n{_source(record)}\n"


def redraw(text: str, records: Sequence[Record]) -> str:
    """`text` with every marked table drawn anew.

    Raises:
        KeyError: As `draw`, or a table has no end: what stands behind it would be lost.
    """
    if not len(MARKED.findall(text)) == text.count("<!-- table: ") == text.count("<!-- end of table -->"):
        raise KeyError("a marker of a table has no counterpart")
    return MARKED.sub(lambda match: f"{match[1]}{draw(match[2], records)}{match[3]}", text)


def main() -> int:
    """Rewrite or check the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing, report tables that are out of date")
    arguments = parser.parse_args()
    records, stale = load_records(), []
    for path in arguments.files:
        text = path.read_text(encoding="utf-8")
        try:
            drawn = redraw(text, records)
        except KeyError as error:
            print(f"{path}: {error.args[0]}", file=sys.stderr)
            return 2
        if drawn == text:
            continue
        stale.append(path)
        if not arguments.check:
            path.write_text(drawn, encoding="utf-8")
        print(f"{path}: {'out of date' if arguments.check else 'rewritten'}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
