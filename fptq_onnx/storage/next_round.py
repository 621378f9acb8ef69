"""The plan of the next fall-back round, kept in a work directory: a stop in that round does not cost the last one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fptq_onnx.quantization.plan import Plan
from fptq_onnx.storage.work_dir import WorkDir

__all__ = ["keep_next_plan", "next_plan"]

_RECORD = "fall-back"


def next_plan(work: WorkDir | None, wish: Mapping[str, Any]) -> Plan | None:
    """The plan that an earlier process had made for the next round, if it was for the same `wish`."""
    if work is None or not work.has(_RECORD):
        return None
    _, notes = work.load(_RECORD)
    return Plan.from_json(notes["plan"], where=str(work.path)) if notes["wish"] == dict(wish) else None


def keep_next_plan(work: WorkDir | None, plan: Plan, wish: Mapping[str, Any]) -> None:
    """Keep the plan of the next round, and nothing of the round that is done.

    Args:
        work: The round's work directory, if it has one.
        plan: The next round's.
        wish: What the plan was made to reach, in JSON types.

    Raises:
        WorkDirError: The disk is full or read-only.
    """
    if work is not None:
        work.save(_RECORD, {}, {"plan": plan.to_json(), "wish": dict(wish)})
        for name in work.names(""):
            if name != _RECORD:
                work.discard(name)
