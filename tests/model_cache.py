"""Folders that are expensive to build, kept between test runs and shared by parallel test processes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# These decide the bytes of an export, with the packages below.
EXPORT_SOURCES = (
    REPOSITORY / "fptq_onnx" / "export" / "signatures.py",
    REPOSITORY / "fptq_onnx" / "export" / "tracing.py",
)
_PACKAGES = ("torch", "transformers", "onnxruntime-genai", "onnxscript", "onnx-ir")


def digest(sources: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that change with the contents of `sources` and the versions of the exporters."""
    state = hashlib.sha256()
    for source in sources:
        state.update(source.read_bytes())
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            state.update(importlib.metadata.version(package).encode())
    return state.hexdigest()[:12]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return folder `name` of the cache, which `build` fills under a temporary name if it is not there yet."""
    folder = Path(os.environ.get("FPTQ_CACHE", REPOSITORY / ".cache" / "fptq")) / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            build(temporary)
            with contextlib.suppress(OSError):  # another process was faster
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
