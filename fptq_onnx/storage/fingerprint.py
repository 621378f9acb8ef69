"""What tells one model file, with its external data, from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["file_fingerprint"]


def file_fingerprint(model: Path, data: Iterable[Path]) -> str:
    """SHA-256 of a model file, and name, size and time of the last change of its external data files.

    External data may be hundreds of gigabytes, so their bytes are not read for this.

    Raises:
        OSError: A file cannot be read.
    """
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for path in sorted(set(data) - {model}):
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns};".encode())
    return digest.hexdigest()
