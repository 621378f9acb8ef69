"""Reading onnxruntime's profile: which node ran where and how long, run by run."""

from __future__ import annotations

__all__ = ["NodeTime", "PhaseTimes", "ProfiledRuns", "read_profile"]

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fptq_onnx.errors import ModelError

_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """One node that ran.

    Attributes:
        name: Name after onnxruntime's optimization.
        op: Operator type.
        provider: Execution provider.
        rows: Elements of its first input divided by that input's last dimension; 0 if it has none.
        microseconds: Median over the runs. On a GPU this is the time to launch it.
    """

    name: str
    op: str
    provider: str
    rows: int
    microseconds: float


@dataclass(frozen=True)
class PhaseTimes:
    """Runs of one kind: their median length, and the nodes in order of execution."""

    run_microseconds: float
    nodes: tuple[NodeTime, ...]


@dataclass(frozen=True)
class ProfiledRuns:
    """Prefill, and the decode steps if there were any."""

    prefill: PhaseTimes
    decode: PhaseTimes | None


def read_profile(path: Path, *, runs: int, steps: int) -> ProfiledRuns:
    """Read a profile whose last runs were `runs` times (one prefill, `steps` decode steps).

    Args:
        path: JSON file of `InferenceSession.end_profiling`.
        runs: Repetitions to use, the last ones of the file; earlier runs are warm-up.
        steps: Decode steps of each.

    Raises:
        ModelError: The file is no profile, or holds fewer runs.
    """
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        whole = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])
        nodes = sorted((e for e in events if e["name"].endswith(_SUFFIX)), key=lambda e: e["ts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(str(path), f"is not a profile of onnxruntime ({error})", "Report this as a bug") from error
    if len(whole) < runs * (1 + steps):
        raise ModelError(
            str(path), f"holds {len(whole)} runs, not {runs * (1 + steps)}", "Run with --no-profile and report this"
        )
    whole = whole[-runs * (1 + steps) :]
    prefill = whole[:: 1 + steps]
    decode = [run for index, run in enumerate(whole) if index % (1 + steps)]
    return ProfiledRuns(_phase(prefill, nodes), _phase(decode, nodes) if decode else None)


def _phase(runs: Sequence[dict[str, Any]], nodes: Sequence[dict[str, Any]]) -> PhaseTimes:
    times: dict[str, list[float]] = defaultdict(list)
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        in_run: dict[str, float] = defaultdict(float)
        for node in nodes:
            if run["ts"] <= node["ts"] < run["ts"] + run["dur"]:
                # A node in a loop's body runs several times in one run.
                in_run[node["name"]] += node["dur"]
                first.setdefault(node["name"], node)
        for name, microseconds in in_run.items():
            times[name].append(microseconds)
    return PhaseTimes(
        statistics.median(run["dur"] for run in runs),
        tuple(_node(first[name], statistics.median(values)) for name, values in times.items()),
    )


def _node(event: dict[str, Any], microseconds: float) -> NodeTime:
    arguments = event["args"]
    shapes = arguments.get("input_type_shape") or [{}]
    shape: list[int] = next(iter(shapes[0].values()), [])
    rows = math.prod(shape[:-1]) if shape and shape[-1] else 0
    return NodeTime(
        event["name"].removesuffix(_SUFFIX), arguments["op_name"], arguments.get("provider", ""), rows, microseconds
    )
