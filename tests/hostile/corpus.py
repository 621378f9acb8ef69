#!/usr/bin/env python3
"""Try every bad input and print, or write into README.md, what happened.

python tests/hostile/corpus.py [NAME...]    try all inputs, or those of these names or groups
python tests/hostile/corpus.py --write      write the table of tests/hostile/README.md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from case import Case, every_case, snapshot

from fptq_onnx.errors import FptqError
from fptq_onnx.report import Report

__all__ = ["README", "outcome", "table"]

README = Path(__file__).with_name("README.md")
_BEGIN, _END = "<!-- table: hostile input -->\n", "<!-- end of table -->\n"
_LONGEST = 400


def happened(tried: Case) -> str:
    """Convert one input and say what came of it; the error of what must not happen, and of files left behind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        attempt = tried.make(folder)
        before = snapshot(folder)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                report = attempt.convert()
        except FptqError as error:
            if snapshot(folder) != before:
                raise AssertionError(f"{tried.name}: the folder changed") from error
            text = str(error).replace(f"{folder}/", "").replace(str(folder), ".")
            return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        if not before.items() <= snapshot(folder).items():
            raise AssertionError(f"{tried.name}: the input changed")
        return outcome(report)


def outcome(report: Report) -> str:
    """What the table says of a model that was converted."""
    quantized = sum(layer.scheme != "float" for layer in report.layers)
    return f"converted, {quantized} of {len(report.layers)} layers quantized"


def table(cases: list[Case]) -> str:
    """The table of what happened, in sections."""
    lines = []
    for group, members in itertools.groupby(cases, key=lambda tried: tried.group):
        lines += [f"\n### {group}\n", "| input | what happened |", "|---|---|"]
        lines += [f"| {_cell(tried.what)} | {_cell(happened(tried))} |" for tried in members]
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    arguments = parser.parse_args()
    if arguments.write:
        head, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
        _, _, tail = rest.partition(_END)
        README.write_text(head + _BEGIN + table(every_case()) + _END + tail, encoding="utf-8")
        return 0
    for tried in every_case():
        if not arguments.names or tried.name in arguments.names or tried.group in arguments.names:
            print(f"{tried.name}: {happened(tried)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
