"""Finding the library, what it exports, and one binary for many runtimes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import op_models
import pytest

import fptq_onnx
from fptq_onnx import ops
from fptq_onnx.errors import RuntimeUnavailableError
from fptq_onnx.ops import library


def test_override_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeUnavailableError, match=r"missing\.so: there is no such file. Build it with"):
        ops.get_library_path()


def test_override_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "libfptq_ops.so"
    other.write_bytes(b"")
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(other))
    assert ops.get_library_path() == other
    with pytest.raises(RuntimeUnavailableError, match=r"libfptq_ops.json: the build record .* Build the library again"):
        ops.library_info()
    other.with_suffix(".json").write_text(json.dumps({"version": "9", "cuda": "13.0"}), encoding="utf-8")
    assert ops.library_info() == ops.LibraryInfo(version="9", cuda="13.0")


def test_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr("fptq_onnx.__path__", [str(tmp_path)])
    with pytest.raises(RuntimeUnavailableError, match=r"not part of this installation. Build it with `pip install .`"):
        ops.get_library_path()


def test_the_most_recent_build_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    folders = [tmp_path / name for name in ("installed", "sources")]
    for folder in folders:
        folder.mkdir()
        (folder / "libfptq_ops.so").write_bytes(b"")
    monkeypatch.setattr("fptq_onnx.__path__", [str(folder) for folder in folders])
    for newest in folders:
        for folder in folders:
            os.utime(folder / "libfptq_ops.so", (0, 2 if folder == newest else 1))
        assert ops.get_library_path() == newest / "libfptq_ops.so"


def test_exports_its_entry_points_only_and_needs_no_onnxruntime() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", op_models.library_path()], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {s for s in symbols if not s.startswith("0") and len(s) > 1} == {
        "RegisterCustomOps",
        "FptqRegisterOps",
        "FptqDescribeLibrary",
        "FptqDescribeProduct",
    }
    dynamic = subprocess.run(["readelf", "-d", op_models.library_path()], capture_output=True, text=True, check=True)
    assert "onnxruntime" not in dynamic.stdout
    assert "libstdc++" not in dynamic.stdout


def test_build_record_matches_the_package() -> None:
    assert ops.library_info().version == fptq_onnx.__version__
