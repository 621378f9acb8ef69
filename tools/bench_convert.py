#!/usr/bin/env python3
"""Convert a model as a user would, and record memory, time per block and the result.

    python tools/make_decoder.py llama-2-7b models --formats fp16      # 13.5 GB of random weights
    python tools/bench_convert.py models/fp16/model.onnx out.onnx --recipe paper --max-memory 8GiB --work-dir work

Options behind the two paths are those of `fptq-onnx convert`. With --work-dir the run may be stopped with Ctrl-C (exit
status 75); the same command goes on, and the record holds all pieces: seconds and peak resident bytes of each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Run from a checkout, too, where neither package is installed.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

from cpu_bench.records import write_record

import fptq_onnx

__all__ = ["main"]

_CONVERT = "import sys; from fptq_onnx.cli import main; sys.argv[0] = 'fptq-onnx'; main()"


def main() -> int:
    """Run one piece of the conversion, and write the record after the last; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--record", type=Path, help="record to write (default: a new file in tools/records)")
    arguments, options = parser.parse_known_args()
    log = arguments.output.with_suffix(".pieces.json")
    pieces = json.loads(log.read_text(encoding="utf-8")) if log.exists() else []
    status, printed, piece = _piece([str(arguments.model), "-o", str(arguments.output), *options])
    pieces.append(piece)
    if status != 0:
        log.write_text(json.dumps(pieces), encoding="utf-8")
        return status
    log.unlink(missing_ok=True)
    record = _content(json.loads(printed), options, pieces)
    path = write_record("convert", record, arguments.record, "tools/bench_convert.py")
    print(f"{path}: peak {max(p['peak_bytes'] for p in pieces) / 2**30:.2f} GiB", file=sys.stderr)
    return 0


def _piece(arguments: list[str]) -> tuple[int, str, dict[str, Any]]:
    """Convert until the end or a stop: exit status, report, and what the process took."""
    environment = os.environ | {"PYTHONPATH": str(Path(fptq_onnx.__file__).parent.parent)}
    begun = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the conversion gets it too, and ends in its own time
    command = [
        sys.executable,
        "-c",
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + _CONVERT,
    ]
    process = subprocess.Popen(
        [*command, "convert", *arguments, "--json"], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    signal.signal(signal.SIGINT, before)
    taken = {
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "status": process.returncode,
    }
    return process.returncode, printed, taken


def _content(report: dict[str, Any], options: list[str], pieces: list[dict[str, Any]]) -> dict[str, Any]:
    layers = report["layers"]
    return {
        "protocol": "One conversion in one or more processes; seconds are wall time on a machine in use, peak_bytes "
        "the largest resident set of a process (ru_maxrss, mapped files included).",
        "options": options,
        "cut": report["segments"],
        "parameters": sum(layer["k"] * layer["n"] for layer in layers),
        "bytes_before": report["bytes_before"],
        "bytes_after": report["bytes_after"],
        "calibration": report["calibration"],
        "pieces": pieces,
        "seconds": report["seconds"],
        "verification": report["verification"],
        "rows": [{"segment": name, **stages} for name, stages in report["segment_seconds"].items()],
    }


if __name__ == "__main__":
    sys.exit(main())
