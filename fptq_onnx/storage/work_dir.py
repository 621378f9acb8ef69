"""A directory of finished pieces of work that survives the process, so that a conversion goes on where it stopped."""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fptq_onnx.errors import WorkDirError

__all__ = ["WorkDir"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

_FINGERPRINT = "fingerprint.json"
_LOCK = "lock"
# Stands while the records of finished work are being removed: what is left of them is of no use.
_CLEARING = "clearing"
_SUFFIX = ".safetensors"
_PARTIAL = ".partial"
# What a process that is killed leaves half-written: by us, or by safetensors under a name of its own.
_HALF_WRITTEN = (f"*{_PARTIAL}", ".tmp*")
# safetensors knows no numpy types from outside numpy; they travel as integers of the same width.
_FOREIGN = {np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16)}


class WorkDir:
    """Records of arrays under names; each appears whole or not at all, whatever ends the process.

    The directory belongs to one job, told by its fingerprint, and to one process at a time, told by a lock that the
    operating system drops with the process.

    Args:
        path: Made if it is missing. One that holds anything but an earlier run of the same job is refused.
        fingerprint: What decides the results: of the model, the data, the recipe, versions.

    Raises:
        WorkDirError: It holds something else, another job's records, or is used by another process.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        """Take the directory, and throw away what an interrupted process left half-written."""
        self.path = Path(path)
        self._lock: int | None = None
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_foreign()
            self._take()
            if (self.path / _CLEARING).exists():
                self._clear()
            self._check_fingerprint(dict(fingerprint))
            for left in self._half_written():
                left.unlink()
        except OSError as error:
            self.close()
            raise _unusable(self.path, error) from error
        except WorkDirError:
            self.close()
            raise

    def __enter__(self) -> WorkDir:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the directory; its records stay."""
        self.close()

    def has(self, name: str) -> bool:
        """Whether a record is complete."""
        return self._file(name).is_file()

    def names(self, prefix: str) -> list[str]:
        """Names of the complete records that begin with `prefix`."""
        return sorted(file.name.removesuffix(_SUFFIX) for file in self.path.glob(f"{prefix}*{_SUFFIX}"))

    def save(self, name: str, arrays: Mapping[str, Array], notes: Mapping[str, Any] | None = None) -> None:
        """Write a record, on the disk before this returns.

        Args:
            name: Its name, good for a file.
            arrays: Of any numpy type, or bfloat16.
            notes: Anything JSON holds.

        Raises:
            WorkDirError: The disk is full or read-only.
        """
        target = self._file(name)
        partial = target.with_name(target.name + _PARTIAL)
        foreign = {key: str(array.dtype) for key, array in arrays.items() if array.dtype in _FOREIGN}
        plain = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        plain = {key: array.view(_FOREIGN.get(array.dtype, array.dtype)) for key, array in plain.items()}
        try:
            save_file(plain, partial, metadata={"notes": json.dumps(notes or {}), "types": json.dumps(foreign)})
            _to_disk(partial)
            os.replace(partial, target)
            _to_disk(self.path)
        except (OSError, SafetensorError) as error:
            raise _unusable(target, error) from error

    def load(self, name: str, prefix: str = "") -> tuple[dict[str, Array], dict[str, Any]]:
        """Read a record back: its arrays, or those whose names begin with `prefix`, and notes.

        Raises:
            WorkDirError: It is missing or damaged.
        """
        with self._opened(name) as (file, notes, types):
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key: _native(file.get_tensor(key), types.get(key)) for key in keys}, notes

    def read(self, name: str, key: str) -> Array:
        """Read one array of a record."""
        with self._opened(name) as (file, _, types):
            return _native(file.get_tensor(key), types.get(key))

    def discard(self, prefix: str) -> None:
        """Remove the records whose names begin with `prefix`."""
        for name in self.names(prefix):
            self._file(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the directory; its records stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the records, and the directory if nothing else is in it."""
        (self.path / _CLEARING).touch()
        self._clear()
        (self.path / _LOCK).unlink(missing_ok=True)
        self.close()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _clear(self) -> None:
        """Remove everything but the lock; a process killed in the middle leaves the sign for the next one to go on."""
        for file in (*self.path.glob(f"*{_SUFFIX}"), *self._half_written()):
            file.unlink()
        for name in (_FINGERPRINT, _CLEARING):
            (self.path / name).unlink(missing_ok=True)

    @staticmethod
    def clear_abandoned(folder: Path, prefix: str) -> None:
        """Remove the directories of dead processes in `folder` whose names begin with `prefix`."""
        for path in folder.glob(f"{glob.escape(prefix)}*"):
            if path.is_dir() and (path / _LOCK).exists():
                handle = _try_lock(path / _LOCK)
                if handle is not None:
                    logger.info("removing %s, which an interrupted process left", path)
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(handle)

    def _half_written(self) -> list[Path]:
        return [path for pattern in _HALF_WRITTEN for path in self.path.glob(pattern)]

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{_SUFFIX}"

    def _check_foreign(self) -> None:
        entries = {entry.name for entry in set(self.path.iterdir()).difference(self._half_written())} - {_LOCK}
        if entries and entries.isdisjoint({_FINGERPRINT, _CLEARING}):
            raise WorkDirError(
                str(self.path), f"holds files of something else ({min(entries)})", "Give an empty folder"
            )

    def _take(self) -> None:
        self._lock = _try_lock(self.path / _LOCK)
        if self._lock is None:
            raise WorkDirError(
                str(self.path), "is in use by another process", "Wait for it, or give another --work-dir"
            )

    def _check_fingerprint(self, fingerprint: dict[str, str]) -> None:
        file = self.path / _FINGERPRINT
        if file.exists():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                differing = [key for key in {**stored, **fingerprint} if stored.get(key) != fingerprint.get(key)]
            except (ValueError, TypeError, AttributeError):
                differing = ["its fingerprint, which is damaged"]
            if differing:
                raise WorkDirError(
                    str(self.path),
                    f"belongs to another conversion: {', '.join(differing)} changed since it was begun",
                    "Remove it to start again, or give another --work-dir",
                )
            return
        partial = file.with_name(file.name + _PARTIAL)
        partial.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        _to_disk(partial)
        os.replace(partial, file)
        _to_disk(self.path)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
        try:
            with safe_open(self._file(name), framework="numpy") as file:
                metadata = file.metadata() or {}
                yield file, json.loads(metadata["notes"]), json.loads(metadata["types"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise WorkDirError(
                str(self._file(name)), f"is damaged ({error})", "Remove the work directory to start again"
            ) from error


def _native(array: Array, dtype: str | None) -> Array:
    return array if dtype is None else array.view(np.dtype(dtype))


def _unusable(path: Path, error: Exception) -> WorkDirError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return WorkDirError(str(path), f"cannot be written: {reason}", "Check the folder and the free space")


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_lock(path: Path) -> int | None:
    """Open and lock a file; None if another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
