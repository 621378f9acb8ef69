"""Where the compiled op library lies and what it was built with."""

from __future__ import annotations

__all__ = ["LIBRARY_VARIABLE", "LibraryInfo", "get_cmake_dir", "get_library_path", "library_info"]

import json
import os
from dataclasses import dataclass
from pathlib import Path

import fptq_onnx
from fptq_onnx.errors import RuntimeUnavailableError

LIBRARY_VARIABLE = "FPTQ_OPS_LIBRARY"
"""Environment variable that overrides the installed library with the path of another build."""

_FILE_NAME = "libfptq_ops.so"
_BUILD_FIX = "Build it with `pip install .`, or set FPTQ_OPS_LIBRARY to a built libfptq_ops.so"


@dataclass(frozen=True)
class LibraryInfo:
    """What the build recorded beside the library.

    Attributes:
        version: Version of the library.
        cuda: Version of the CUDA compiler, None for a library with CPU kernels only.
    """

    version: str
    cuda: str | None


def get_library_path() -> Path:
    """Return the path of the op library, for ``SessionOptions.register_custom_ops_library(str(path))``.

    Raises:
        RuntimeUnavailableError: The library was not built, or FPTQ_OPS_LIBRARY names no file.
    """
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        path = Path(override)
        if not path.is_file():
            raise RuntimeUnavailableError(f"{LIBRARY_VARIABLE}={override}", "there is no such file", _BUILD_FIX)
        return path.resolve()
    # An editable install has two folders, the sources and the built files, and a developer may build into both.
    built = [path for folder in fptq_onnx.__path__ if (path := Path(folder) / _FILE_NAME).is_file()]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    raise RuntimeUnavailableError(_FILE_NAME, "the op library is not part of this installation", _BUILD_FIX)


def get_cmake_dir() -> Path:
    """Return the folder of the library's CMake package, for ``-Dfptq_ops_DIR=`` and ``find_package(fptq_ops)``.

    Raises:
        RuntimeUnavailableError: The library was not built, or has no CMake package beside it.
    """
    folder = get_library_path().parent / "cmake" / "fptq_ops"
    if not (folder / "fptq_ops-config.cmake").is_file():
        raise RuntimeUnavailableError(
            str(folder),
            "the op library has no CMake package beside it",
            "Install it with `pip install .` or `make lib`",
        )
    return folder


def library_info() -> LibraryInfo:
    """Return what the op library was built with.

    Raises:
        RuntimeUnavailableError: There is no library, or its record (libfptq_ops.json) is missing or damaged.
    """
    record = get_library_path().with_suffix(".json")
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        return LibraryInfo(version=data["version"], cuda=data["cuda"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeUnavailableError(
            str(record), f"the build record of the op library cannot be read ({error})", "Build the library again"
        ) from error
