#!/usr/bin/env python3
"""Write what the sanitizers' runs of the kernel tests found to tools/records/; `make sanitize RECORD=1` calls it.

    python tools/record_sanitizers.py address+undefined=build/sanitize/results.xml thread=build/tsan/results.xml

Each argument names sanitizers and the JUnit file that `ctest --output-junit` wrote. A test that failed, or a file that
holds none, is an error, and no record is written.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

# Run from a checkout, too, where neither package is installed.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    sys.path.insert(0, str(folder))

from cpu_bench.records import write_record

__all__ = ["main", "rows"]


def rows(sanitizers: str, results: Path) -> list[dict[str, Any]]:
    """One row per test of a JUnit file: sanitizers, test, seconds.

    Raises:
        SystemExit: The file holds no test, or one that did not pass.
    """
    cases = ElementTree.parse(results).getroot().findall(".//testcase")
    failed = [str(case.get("name")) for case in cases if case.get("status") != "run" or len(case.findall("failure"))]
    if failed or not cases:
        raise SystemExit(
            f"{results}: {', '.join(failed) + ' did not pass' if failed else 'no test was run'}. No record."
        )
    return [
        {"sanitizers": sanitizers, "test": case.get("name"), "seconds": round(float(case.get("time", "nan")), 2)}
        for case in cases
    ]


def main() -> int:
    """Write the record; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="SANITIZERS=RESULTS.xml")
    parser.add_argument("--json", type=Path, help="record to write (default: a new file in tools/records)")
    arguments = parser.parse_args()
    found = []
    for run in arguments.runs:
        sanitizers, _, results = run.partition("=")
        found += rows(sanitizers, Path(results))
    protocol = "Each test is a program of custom_ops/tests, compiled with the sanitizers; a report of theirs fails it."
    content = {"protocol": protocol, "failures": 0, "rows": found}
    print(write_record("sanitize", content, arguments.json, "tools/record_sanitizers.py"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
