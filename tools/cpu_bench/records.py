"""The machine a benchmark ran on, and its record in tools/records/."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fptq_onnx import ops

__all__ = ["RECORDS", "machine", "record_path", "write_record"]

RECORDS = Path(__file__).resolve().parent.parent / "records"
PACKAGES = ("onnxruntime", "numpy", "openvino", "nncf", "xllamacpp")


def machine() -> dict[str, Any]:
    """Describe the processor, its vector sets and the versions in use."""
    flags: set[str] = set()
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{fields.get('model name', model)} family {fields.get('cpu family')} model {fields.get('model')}"
        flags = set(fields.get("flags", "").split())
    wanted = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"]
    versions = {"python": platform.python_version(), "fptq_ops": ops.library_info().version}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "vector_sets": [flag for flag in wanted if flag in flags],
        "kernels": os.environ.get("FPTQ_CPU_ISA", "chosen by the library"),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def record_path(created: str, cpu: str, kind: str) -> Path:
    """The name that tools/records/README.md asks for; no record is replaced."""
    stem = f"{created[:10]}-{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}-{kind}"
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(path for name in names if not (path := RECORDS / f"{name}.json").exists())


def write_record(kind: str, content: dict[str, Any], path: Path | None, program: str = "tools/bench_cpu.py") -> Path:
    """Write `content` with what every record holds; `path` overrides the name."""
    description, created = machine(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {
        "kind": kind,
        "created": created,
        "commit": os.environ.get("FPTQ_GIT_COMMIT") or _commit(),
        "command": " ".join(["python", program, *sys.argv[1:]]),
        "machine": description,
        **content,
    }
    path = path or record_path(created, description["cpu"], kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
