"""Findings of the doctor."""

from __future__ import annotations

__all__ = ["Diagnosis", "Finding", "Status"]

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What, in a word or two.
        status: How it is.
        detail: What was found.
        fix: What to do about it, in the imperative; None where nothing is to be done.
    """

    check: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which one depends on the other."""

    findings: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        """Whether something will not work."""
        return any(finding.status is Status.BROKEN for finding in self.findings)
