"""The work directory of one conversion: the user's, which survives a stop, or one beside the output, or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fptq_onnx.errors import WorkDirError
from fptq_onnx.storage.work_dir import WorkDir

__all__ = ["workspace"]


@contextmanager
def workspace(
    given: str | os.PathLike[str] | None, target: Path, fingerprint: Callable[[], Mapping[str, str]], *, wanted: bool
) -> Iterator[WorkDir | None]:
    """Open the place where finished work lies, and clear it away when the work is done.

    Args:
        given: A directory that the user named; it is kept, with what is finished, if the work ends with an error.
        target: The output; a temporary directory is made beside it, and those of dead processes are removed.
        fingerprint: Of the work, asked only for a directory that the user named.
        wanted: Whether to make a temporary directory where none is given.

    Yields:
        The directory, or None if everything can be kept in memory.

    Raises:
        WorkDirError: The directory cannot be used.
    """
    prefix = f".{target.name}.work-"
    WorkDir.clear_abandoned(target.parent, prefix)
    if given is None and not wanted:
        yield None
        return
    if given is not None:
        work = WorkDir(given, fingerprint())
    else:
        try:
            work = WorkDir(tempfile.mkdtemp(prefix=prefix, dir=target.parent), {})
        except OSError as error:
            raise WorkDirError(
                str(target.parent), f"cannot be written: {error.strerror}", "Check the folder and the free space"
            ) from error
    done = False
    try:
        yield work
        done = True
    finally:
        if done or given is None or not work.names(""):
            work.remove()
        else:
            work.close()
