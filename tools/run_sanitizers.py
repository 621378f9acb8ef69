#!/usr/bin/env python3
"""Run the CUDA kernels under compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

    python tools/run_sanitizers.py build/.../libfptq_kernels.so

Builds tests/gpu/sanitizer_driver.cu with nvcc, which runs every kernel on small problems through its C interface
and checks the results. Needs an NVIDIA GPU, nvcc and compute-sanitizer. Exit status 0 if every tool is clean.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["build_driver", "main"]

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def build_driver(folder: Path, architecture: str) -> Path:
    """Compile the driver into `folder` and return its path.

    Raises:
        FileNotFoundError: There is no nvcc on PATH.
        subprocess.CalledProcessError: nvcc failed; its messages are on stderr.
    """
    driver = folder / "sanitizer_driver"
    sources = ROOT / "custom_ops" / "src"
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-O1",
            f"-arch={architecture}",
            f"-I{sources}",
            "-o",
            driver,
            ROOT / "tests" / "gpu" / "sanitizer_driver.cu",
            "-ldl",
        ],
        check=True,
    )
    return driver


def main() -> int:
    """Run the tools; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="shared library of the kernels' C interface")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--few", action="store_true", help="one problem per code path for every tool")
    parser.add_argument("--arch", default="native", help="nvcc -arch of the driver (default %(default)s)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds per tool (default %(default)s)")
    arguments = parser.parse_args()
    missing = [tool for tool in ("nvcc", "compute-sanitizer") if shutil.which(tool) is None]
    if missing:
        print(f"run_sanitizers: not on PATH: {', '.join(missing)}", file=sys.stderr)
        return 2

    failed = []
    with tempfile.TemporaryDirectory() as folder:
        driver = build_driver(Path(folder), arguments.arch)
        for tool in arguments.tools:
            # Racecheck keeps track of every shared-memory access: one problem per path is what it can do in a minute.
            few = ["few"] if arguments.few or tool == "racecheck" else []
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", driver, arguments.library, *few]
            begin = time.monotonic()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
                status, output = done.returncode, done.stdout + done.stderr
            except subprocess.TimeoutExpired as error:
                status, output = 124, str(error.stdout or "")
            print(f"{tool}: {'clean' if status == 0 else f'exit status {status}'}, {time.monotonic() - begin:.0f} s")
            print("  " + "\n  ".join(output.strip().splitlines()[-(2 if status == 0 else 60) :]), flush=True)
            if status:
                failed.append(tool)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
