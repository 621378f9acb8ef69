"""The installed CMake package: found from an install tree and from the Python package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import families
import pytest
from conversions import converted
from programs import CPP, REPOSITORY, build_cpp, cmake, tokens, tool

import fptq_onnx
from fptq_onnx.errors import RuntimeUnavailableError


def _build_tree(tmp_path: Path) -> Path:
    """A built tree of custom_ops: the newest one in build/, else a new one."""
    names = ("lib", "ops-test", "py3-none-*")
    trees = [
        tree for name in names for tree in (REPOSITORY / "build").glob(name) if (tree / "libfptq_ops.so").is_file()
    ]
    if trees:
        return max(trees, key=lambda tree: (tree / "libfptq_ops.so").stat().st_mtime)
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DFPTQ_CUDA=OFF"]
    cmake("-S", REPOSITORY / "custom_ops", "-B", tmp_path / "tree", *options)
    cmake("--build", tmp_path / "tree")
    return tmp_path / "tree"


def test_install_tree_can_be_moved_and_used(tmp_path: Path) -> None:
    cmake("--install", _build_tree(tmp_path), "--component", "sdk", "--prefix", tmp_path / "installed")
    moved = (tmp_path / "installed").rename(tmp_path / "elsewhere")
    files = {str(path.relative_to(moved)) for path in moved.rglob("*") if path.is_file()}
    assert {"include/fptq/fptq_ops.h", "include/fptq/register.h", "lib/libfptq_ops.so"} < files
    program = build_cpp(moved / "lib" / "cmake" / "fptq_ops", tmp_path / "example")
    assert program.is_file()
    assert str(moved) in _libraries(program)


def test_python_package_carries_the_same_package() -> None:
    folder = fptq_onnx.get_cmake_dir()
    assert (folder / "fptq_ops-config.cmake").is_file()
    # `tokens` builds the example against it.
    assert len(tokens(CPP, converted("llama", families.DYNAMO_KV).path, [1, 2], "--tokens", 2)) == 2


def test_a_newer_minor_version_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(wrong LANGUAGES NONE)\n"
        "find_package(fptq_ops 0.2 QUIET)\nif(fptq_ops_FOUND)\n  message(FATAL_ERROR found)\nendif()\n"
        "find_package(fptq_ops 0.1 REQUIRED)\n"
    )
    cmake("-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
          f"-DCMAKE_PREFIX_PATH={fptq_onnx.get_cmake_dir()}")  # fmt: skip


def test_a_library_without_package_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libfptq_ops.so").write_bytes(b"")
    monkeypatch.setenv("FPTQ_OPS_LIBRARY", str(tmp_path / "libfptq_ops.so"))
    with pytest.raises(RuntimeUnavailableError, match="has no CMake package beside it"):
        fptq_onnx.get_cmake_dir()


def _libraries(program: Path) -> str:
    return subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
