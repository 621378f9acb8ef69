"""The command line, one command per file: each parses its arguments, calls the Python API and prints what came back."""

import importlib

from fptq_onnx.cli.common import app

__all__ = ["app", "main"]

# Importing a command's file registers it; `--help` lists the commands in this order.
for _command in (
    "analyze",
    "convert",
    "evaluate",
    "export",
    "generate",
    "package",
    "bench",
    "doctor",
):
    importlib.import_module(f"fptq_onnx.cli.{_command}")


def main() -> None:
    """Run the command line; the entry point of `fptq-onnx`."""
    app()
