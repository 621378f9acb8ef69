"""Benchmark records: what was measured, on what, with which command, as one JSON file each."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RECORDS_DIRECTORY", "environment", "gpu_state", "load_records", "write_record"]

RECORDS_DIRECTORY = Path(__file__).resolve().parent.parent / "records"
PACKAGES = ("numpy", "onnx", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "humming-kernels", "fptq-onnx")
GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_state(index: int = 0) -> dict[str, str]:
    """Name, driver and present clocks of one GPU as nvidia-smi tells them; empty where it is absent."""
    text = _output(
        ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    )
    if not text:
        return {}
    return dict(zip(GPU_FIELDS, (cell.strip() for cell in text.splitlines()[0].split(",")), strict=True))


def _commit() -> str:
    """The commit measured: FPTQ_GIT_COMMIT where the tree travelled without .git, "+changes" if the tree is dirty."""
    given = os.environ.get("FPTQ_GIT_COMMIT")
    if given:
        return given
    here = str(Path(__file__).resolve().parent)
    commit = _output(["git", "-C", here, "rev-parse", "HEAD"])
    if commit is None:
        return "unknown"
    return commit + ("+changes" if _output(["git", "-C", here, "status", "--porcelain"]) else "")


def environment() -> dict[str, Any]:
    """The machine, versions and command of this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "onnxruntime" in sys.modules:
        # The imported runtime, whatever distribution metadata lie beside it.
        versions["onnxruntime"] = sys.modules["onnxruntime"].__version__
    if "torch" in sys.modules:
        versions["cuda"] = str(sys.modules["torch"].version.cuda)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "platform": platform.platform(),
        "gpu": gpu_state(),
        "versions": versions,
    }


def write_record(
    kind: str, head: Mapping[str, Any], body: Mapping[str, Any], directory: Path = RECORDS_DIRECTORY
) -> Path:
    """Write one record and return its path, `<date>-<gpu>-<kind>.json`, never over an older one.

    Args:
        kind: What the rows are, e.g. "gpu-kernels"; `tools/make_tables.py` looks it up.
        head: `environment()` taken before the measurement; the clocks after it are added here.
        body: "protocol" (how it was measured) and "rows" (the figures).
        directory: Where records live.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", head.get("gpu", {}).get("name", "no-gpu").lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{head['created'][:10]}-{gpu}-{kind}"
    path, copy = directory / f"{stem}.json", 2
    while path.exists():
        path, copy = directory / f"{stem}-{copy}.json", copy + 1
    record = {"kind": kind, **head, "gpu_after": gpu_state(), **body}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def load_records(directory: Path = RECORDS_DIRECTORY) -> list[dict[str, Any]]:
    """All records of a directory, oldest first.

    Raises:
        ValueError: A file is no record (no "kind" or "created").
    """
    records = []
    for path in sorted(directory.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not {"kind", "created"} <= record.keys():
            raise ValueError(f"{path}: not a benchmark record: it has no 'kind' or no 'created'")
        records.append({**record, "file": path.name})
    # Of one second, "-2" is the later one.
    return sorted(records, key=lambda record: (str(record["created"]), len(record["file"]), record["file"]))
