#!/usr/bin/env python3
"""Attack the op library and record what happened: random nodes in C++, coverage-guided ones, random sessions.

    python tools/fuzz_ops.py BUILD [--cases N] [--sessions N] [--guided SECONDS] [--seed N]

BUILD is a CMake build of custom_ops with FPTQ_BUILD_TESTS and FPTQ_SANITIZE=address,undefined (`make fuzz` makes it).
Its `fptq_fuzz_ops` calls the library's entry points on a stand-in for the runtime; the sessions are onnxruntime's own,
with the sanitized library preloaded. Exit status 0 if nothing was found; the record goes to tools/records.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "hostile"), str(ROOT)]

import fuzz_sessions
from cpu_bench.records import write_record

__all__ = ["main"]

SANITIZERS = {"UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "allocator_may_return_null=1"}


def nodes(build: Path, cases: int, seed: int) -> dict[str, Any]:
    """Random nodes in C++, one process per core with a seed of its own; the sums of the counts that they print."""
    program = build / "tests" / "fuzz" / "fptq_fuzz_ops"
    workers = min(os.cpu_count() or 1, cases)
    running = []
    for worker in range(workers):
        share = cases * (worker + 1) // workers - cases * worker // workers
        command = [program, str(share), str(seed + worker)]
        running.append(subprocess.Popen(command, env=os.environ | SANITIZERS, stdout=subprocess.PIPE, text=True))
    total: dict[str, Any] = {}
    try:
        for process in running:
            output, _ = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args)
            for name, value in json.loads(output).items():
                total[name] = max(total.get(name, 0), value) if name == "seconds" else total.get(name, 0) + value
    finally:
        for process in running:
            process.kill()  # those that still run after a failure
    return total | {"seed": f"{seed}..{seed + workers - 1}"}


def guided(build: Path, seconds: int, seed: int) -> dict[str, Any]:
    """The same nodes, mutated by libFuzzer towards new code; cases run and edges of code reached."""
    program = build / "tests" / "fuzz" / "fptq_fuzz_ops_guided"
    command = [program, f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=256", "-len_control=0"]
    command += ["-print_final_stats=1", "-artifact_prefix=/tmp/fptq-fuzz-"]
    done = subprocess.run(command, env=os.environ | SANITIZERS, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr[-8000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    words = done.stderr.split()
    return {
        "cases": int(words[words.index("stat::number_of_executed_units:") + 1]),
        "edges": max(int(words[i + 1]) for i, word in enumerate(words) if word == "cov:"),
        "seconds": seconds,
        "seed": seed,
    }


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--cases", type=int, default=1_000_000, help="random nodes in C++ (default %(default)s)")
    parser.add_argument("--sessions", type=int, default=5000, help="sessions of onnxruntime (default %(default)s)")
    parser.add_argument("--guided", type=int, default=0, metavar="SECONDS", help="libFuzzer; needs clang's build")
    parser.add_argument("--guided-build", type=Path, help="build with FPTQ_LIBFUZZER, if it is another")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="record to write (default: a new file in tools/records)")
    arguments = parser.parse_args()

    found: dict[str, Any] = {}
    started = time.monotonic()
    try:
        found["nodes"] = nodes(arguments.build, arguments.cases, arguments.seed)
        print(f"nodes: {found['nodes']}", flush=True)
        if arguments.guided:
            found["guided"] = guided(arguments.guided_build or arguments.build, arguments.guided, arguments.seed)
            print(f"guided: {found['guided']}", flush=True)
        begin = time.monotonic()
        counts = fuzz_sessions.fuzz(arguments.sessions, arguments.seed, arguments.build / "libfptq_ops.so")
        found["sessions"] = {"cases": arguments.sessions, "seed": arguments.seed, **counts}
        found["sessions"]["seconds"] = round(time.monotonic() - begin, 1)
        print(f"sessions: {found['sessions']}", flush=True)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"fuzz_ops: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "tools/fuzz_ops.py", *sys.argv[1:]])
    content = {
        "command": command,
        "sanitizers": "address,undefined",
        "seconds": round(time.monotonic() - started, 1),
        "failures": 0,
    }
    print(
        write_record(
            "fuzz", content | {"rows": [{"attack": name, **row} for name, row in found.items()]}, arguments.json
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
