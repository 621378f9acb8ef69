"""What one bad input is, and how a conversion is tried on it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fptq_onnx
from fptq_onnx.errors import FptqError, ModelError
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report

__all__ = ["Attempt", "Case", "Snapshot", "case", "every_case", "snapshot"]

# Little data and small groups: a conversion takes a tenth of a second.
OVERRIDES: dict[str, Any] = {"calibration.windows": 2, "calibration.length": 8, "weights.group_size": 32}
VERIFY_TOKENS = 16


@dataclass
class Attempt:
    """Arguments of one conversion.

    Attributes:
        model: The bad model, or a sound one.
        output: Where to write; `out.onnx` beside the model by default.
        options: Other arguments of `fptq_onnx.convert`.
        recipe: Name or path.
        overrides: Fields of the recipe beyond `OVERRIDES`.
        around: Entered for the time of the conversion, such as to take the disk away.
    """

    model: Path
    output: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str | Path = "balanced"
    overrides: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def target(self) -> Path:
        return self.output or self.model.with_name("out.onnx")

    @property
    def is_for_the_shell(self) -> bool:
        """Whether the command line can say the same: data in memory cannot be given there."""
        return all(isinstance(value, str | Path | bool | int | float) for value in self.options.values())

    def convert(self) -> Report:
        """Through Python."""
        settings = Recipe.load(self.recipe, OVERRIDES | self.overrides)
        arguments = {"verify_tokens": VERIFY_TOKENS} | self.options
        with self.around():
            return fptq_onnx.convert(self.model, self.target, recipe=settings, **arguments)

    def command(self) -> list[str]:
        """The same for the shell, without the program's name."""
        words = ["convert", str(self.model), "--output", str(self.target), "--recipe", str(self.recipe)]
        for name, value in (OVERRIDES | self.overrides).items():
            words += ["--set", f"{name}={value}"]
        for name, value in ({"verify_tokens": VERIFY_TOKENS} | self.options).items():
            option = "--" + name.replace("_", "-").replace("output-format", "format")
            words += [option] if value is True else [option, str(value)]
        return words


@dataclass(frozen=True)
class Case:
    """One input and what must happen.

    Attributes:
        name: Identifier.
        group: Section of the table.
        what: The input, for the table.
        make: Writes the files into an empty folder and returns how to convert them.
        refused: Text of the one error; None where the input is handled and a model is written.
        error: Class of the error.
        check: Looks at the report of a written model.
    """

    name: str
    group: str
    what: str
    make: Callable[[Path], Attempt]
    refused: str | None
    error: type[FptqError]
    check: Callable[[Report], None]


_CASES: dict[str, Case] = {}


def case(
    group: str,
    what: str,
    refused: str | None,
    *,
    error: type[FptqError] = ModelError,
    check: Callable[[Report], None] = lambda report: None,
) -> Callable[[Callable[[Path], Attempt]], Callable[[Path], Attempt]]:
    """Register the function below as a case under its own name."""

    def register(make: Callable[[Path], Attempt]) -> Callable[[Path], Attempt]:
        name = make.__name__
        assert name not in _CASES, name
        _CASES[name] = Case(name, group, what, make, refused, error, check)
        return make

    return register


def every_case() -> list[Case]:
    """All cases, in the order of the table."""
    for module in ("bad_files", "bad_graphs", "odd_graphs", "bad_data", "bad_outputs"):
        importlib.import_module(module)
    return list(_CASES.values())


Snapshot = dict[str, str]


def snapshot(folder: Path) -> Snapshot:
    """What lies in a folder: SHA-256 of files, targets of links, kinds of the rest, by relative path."""
    return {str(path.relative_to(folder)): _content(path) for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        yield from (Path(root) / name for name in (*folders, *files))


def _content(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return f"mode {stat.S_IFMT(status.st_mode):o}"
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}, mode {stat.S_IMODE(status.st_mode):o}"
