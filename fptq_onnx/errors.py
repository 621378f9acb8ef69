"""The errors a user of fptq-onnx can meet, each naming the place, the reason and the fix."""

from __future__ import annotations

import re

__all__ = [
    "CalibrationError",
    "FptqError",
    "ModelError",
    "NothingQuantizedError",
    "RecipeError",
    "RuntimeUnavailableError",
    "StoppedError",
    "VerificationError",
    "WorkDirError",
    "why_unreadable",
]


class FptqError(Exception):
    """Base of every error this package raises on purpose.

    Names come from files of strangers: line breaks become blanks and control characters are escaped, so that a message
    is one line and cannot steer a terminal.

    Args:
        where: The file, node, layer or option that is at fault, as the user knows it.
        reason: What is wrong with it, one clause without a trailing full stop.
        fix: What the user can do about it, in the imperative.
    """

    def __init__(self, where: str, reason: str, fix: str) -> None:
        """Compose the one-line message "where: reason. Fix."."""
        self.where = _one_line(where)
        self.reason = _one_line(reason).rstrip(".")
        told = _one_line(fix).rstrip(".")
        self.fix = told[:1].upper() + told[1:]
        super().__init__(f"{self.where}: {self.reason}. {self.fix}.")

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the three parts, so that a worker process can hand the error over."""
        return type(self), (self.where, self.reason, self.fix), self.__dict__


def _one_line(text: str) -> str:
    line = re.sub(r"\s*[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*", " ", text).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class ModelError(FptqError):
    """The model file or graph is broken or holds something that cannot be handled."""


class RecipeError(FptqError):
    """A recipe or plan does not fit its schema or the model."""


class CalibrationError(FptqError):
    """Calibration or evaluation data are missing, empty or do not fit the model."""


class RuntimeUnavailableError(FptqError):
    """onnxruntime, an execution provider or the custom-op library cannot be used here."""


class NothingQuantizedError(FptqError):
    """No layer of the model was quantized, so no output was written."""


class WorkDirError(FptqError):
    """A work directory is damaged, in use, or belongs to something else."""


class StoppedError(FptqError):
    """The work was stopped as asked; what is finished lies in the work directory, and the same call goes on there."""


class VerificationError(FptqError):
    """A written model loads but differs from the model it was made from by more than allowed.

    Attributes:
        report: The report of the conversion, for callers who want the figures; None from an export.
    """

    def __init__(self, where: str, reason: str, fix: str, report: object | None = None) -> None:
        """Keep the report beside the message."""
        super().__init__(where, reason, fix)
        self.report = report


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Reason clause for a file that could not be read, the same wherever it is a user's file."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text ({error.reason})"
    return f"cannot be read ({error.strerror or error})"
