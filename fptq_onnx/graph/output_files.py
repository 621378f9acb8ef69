"""Files that appear whole, together, and never over a file that is read."""

from __future__ import annotations

__all__ = ["Staging", "refuse_overwriting", "scratch_folder", "staged", "write_text", "writing"]

import contextlib
import fcntl
import os
import pathlib
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fptq_onnx.errors import ModelError


class Staging:
    """A hidden folder beside an output file, in which it and its companions are written.

    Attributes:
        folder: The folder; what it holds when it is published appears beside the output.
        path: Where to write the output file itself.
    """

    def __init__(self, folder: pathlib.Path, target: pathlib.Path) -> None:
        """Use `staged` instead."""
        self.folder, self.path, self._target = folder, folder / target.name, target

    def publish(self) -> None:
        """Move all files to their places, the output file last: it never lies beside companions of another.

        The external data of a model that is replaced go with it where they would be nobody's, see `_data_of`.

        Raises:
            ModelError: A place is taken by a folder.
        """
        with writing(self._target):
            companions = sorted(path for path in self.folder.iterdir() if path != self.path)
            for companion in companions:
                if (self._target.parent / companion.name).is_dir():
                    raise IsADirectoryError(0, f"{companion.name} is a folder")
            left = _data_of(self._target) - {companion.name for companion in companions}
            if companions:
                self._target.unlink(missing_ok=True)
            for companion in companions:
                os.replace(companion, self._target.parent / companion.name)
            os.replace(self.path, self._target)
            for name in left:
                (self._target.parent / name).unlink(missing_ok=True)


@contextlib.contextmanager
def staged(target: pathlib.Path) -> Iterator[Staging]:
    """Give a place to write an output file in; what is not published disappears again.

    The place is a folder beside the target, so that publishing is a matter of renames.

    Raises:
        ModelError: The target is a folder or a link to itself, or its folder is missing or cannot be written to.
    """
    with writing(target), contextlib.suppress(FileNotFoundError):
        # Fails for a link to itself and for a name that is too long.
        if stat.S_ISDIR(target.stat().st_mode):
            raise ModelError(str(target), "the output path is a folder", "give the name of a file in it")
    with scratch_folder(target) as folder:
        try:
            yield Staging(folder, target)
        except ModelError as error:
            hidden = f"{folder.name}{os.sep}"  # the user knows the place it was for
            if hidden not in str(error):
                raise
            raise ModelError(error.where.replace(hidden, ""), error.reason.replace(hidden, ""), error.fix) from error


@contextlib.contextmanager
def scratch_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a hidden folder beside `target`, on its file system; it disappears again, unless it was moved away.

    Folders that an earlier process left when it was killed are removed.

    Raises:
        ModelError: The folder of `target` is missing or cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with writing(target):
            prefix = f".fptq-onnx-{zlib.crc32(os.fsencode(target.name)):08x}-"
            for left in target.parent.glob(f"{prefix}*"):
                _remove_if_left(left)
            folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a small text file whole or not at all.

    Raises:
        ModelError: It cannot be written.
    """
    with staged(path) as staging:
        with writing(path):
            staging.path.write_text(text, encoding="utf-8")
        staging.publish()


def refuse_overwriting(
    written: Iterable[pathlib.Path],
    read: Iterable[pathlib.Path],
    reason: str = "this is the file the model is read from",
) -> None:
    """Refuse to write files over those that are read, by whatever name: links of both kinds are seen through.

    Raises:
        ModelError: A path of `written` is one of `read`.
    """
    inputs = list(read)
    for path in written:
        for other in inputs:
            if os.path.realpath(path) == os.path.realpath(other) or _is_same(path, other):
                raise ModelError(str(path), reason, "choose another output path")


def _is_same(path: pathlib.Path, other: pathlib.Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one does not exist
        return False


def _data_of(target: pathlib.Path) -> set[str]:
    """Name of the external data that `save_model` wrote for the model at `target`: it names them, and lies beside them.

    Empty for links, for files that are no model, and for data of any other name, which other models may share.
    """
    data = target.with_name(f"{target.name}.data")
    if target.is_symlink() or not target.is_file() or data.is_symlink() or not data.is_file():
        return set()
    try:
        tensors = onnx.load(str(target), format="protobuf", load_external_data=False).graph.initializer
    except (OSError, DecodeError, RuntimeError, ValueError):
        return set()
    named = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return named & {data.name}


def _remove_if_left(folder: pathlib.Path) -> None:
    """Remove a folder whose lock nobody holds: the kernel frees the lock of a process that is killed."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use
        return
    finally:
        os.close(lock)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turn errors of the operating system while `path` is written into a ModelError that names it."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            str(path), f"cannot be written: {error.strerror or error}", "check the folder and the free space"
        ) from error
