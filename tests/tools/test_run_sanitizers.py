"""The sanitizer driver builds against the kernels' C interface; running it needs a GPU."""

import shutil
import subprocess

import pytest
import run_sanitizers


def test_driver_builds_and_names_a_missing_library(tmp_path):
    if shutil.which("nvcc") is None:
        with pytest.raises(FileNotFoundError, match="nvcc"):
            run_sanitizers.build_driver(tmp_path, "sm_90")
        return
    driver = run_sanitizers.build_driver(tmp_path, "sm_90")
    done = subprocess.run([driver, tmp_path / "absent.so"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "absent.so" in done.stderr


def test_missing_tools_are_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_sanitizers.py", "lib.so"])
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert run_sanitizers.main() == 2
    assert "nvcc, compute-sanitizer" in capsys.readouterr().err
