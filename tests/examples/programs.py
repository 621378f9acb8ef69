"""The C++ and C# example programs, built once per test session, and what they print."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fptq_onnx
from tools import csharp_example

REPOSITORY = Path(__file__).parent.parent.parent
CPP, CSHARP = "C++", "C#"


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one of the programs."""
    return subprocess.run([*command(program), *map(str, arguments)], capture_output=True, text=True, check=False)


def tokens(program: str, model: Path, prompt: Sequence[int], *options: object) -> list[int]:
    """The token ids that a program prints."""
    done = run(program, model, ",".join(map(str, prompt)), *options)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    return [int(token) for token in done.stdout.split()]


@functools.cache
def command(program: str) -> tuple[str, ...]:
    """How a program is started."""
    if program == CSHARP:
        return tuple(csharp_example.build(_folder("csharp")))
    return (str(build_cpp(fptq_onnx.get_cmake_dir(), _folder("cpp"))),)


def build_cpp(package: Path, target: Path) -> Path:
    """Build the C++ example against the CMake package in folder `package`; its executable."""
    arguments = [
        "-S", REPOSITORY / "custom_ops" / "examples" / "cpp", "-B", target, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-Dfptq_ops_DIR={package}", f"-DONNXRUNTIME_ROOT={_release()}",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror",
    ]  # fmt: skip
    cmake(*arguments)
    cmake("--build", target)
    return target / "generate"


def cmake(*arguments: object) -> None:
    """Run cmake, which must succeed."""
    done = subprocess.run([tool("cmake"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tool(name: str) -> str:
    """Path of a program of the environment's dev extra, or of the system."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is missing: pip install {name}"
    return found


@functools.cache
def _release() -> Path:
    """A folder laid out as onnxruntime's releases are: the official headers and the installed wheel's library."""
    folder = _folder("onnxruntime")
    (folder / "include").symlink_to(csharp_example.onnxruntime_sources() / "include")
    (folder / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(csharp_example.native_onnxruntime())
    return folder


def _folder(name: str) -> Path:
    folder = tempfile.mkdtemp(prefix=f"fptq-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
