"""Other versions of onnxruntime, each in a virtual environment of its own that is kept between runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"


def python_with(version: str) -> Path:
    """Return an interpreter that has onnxruntime `version` and nothing else of this project."""
    folder = CACHE / f"onnxruntime-{version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", f"onnxruntime=={version}"]
        subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
        (folder / "complete").touch()
    return python
