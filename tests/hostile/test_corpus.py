"""Every bad input through Python and through the command line: one clear error or right handling, and no traces."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from case import Case, every_case, snapshot
from corpus import README, outcome
from typer.testing import CliRunner

from fptq_onnx.cli import app

LONGEST = 60  # seconds; a case takes a tenth of one


@pytest.fixture(autouse=True)
def _no_case_hangs() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"the case took more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("tried", every_case(), ids=lambda tried: tried.name)
def test_through_python(tried: Case, tmp_path: Path) -> None:
    attempt = tried.make(tmp_path)
    before = snapshot(tmp_path)
    if tried.refused is None:
        report = attempt.convert()
        _check_written(before, tmp_path, attempt.target)
        tried.check(report)
        assert _rows()[tried.name] == outcome(report), "run tests/hostile/corpus.py --write"
        return
    with pytest.raises(tried.error) as caught:
        attempt.convert()
    _check_message(str(caught.value), tried.refused)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("tried", every_case(), ids=lambda tried: tried.name)
def test_through_the_command_line(tried: Case, tmp_path: Path) -> None:
    attempt = tried.make(tmp_path)
    if not attempt.is_for_the_shell:
        return  # data in memory: Python only
    before = snapshot(tmp_path)
    with attempt.around():
        result = CliRunner().invoke(app, attempt.command(), terminal_width=200)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.stderr
    if tried.refused is None:
        assert result.exit_code == 0, result.stderr
        _check_written(before, tmp_path, attempt.target)
        return
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.endswith(errors[0] + "\n"), result.stderr
    _check_message(errors[0].removeprefix("error: "), tried.refused)
    assert result.stdout == ""
    assert snapshot(tmp_path) == before


def _check_message(message: str, wanted: str) -> None:
    """One line "place: reason. Fix."."""
    assert wanted in message
    assert "\n" not in message and message.endswith(".")
    place, _, reason = message.partition(": ")
    assert place and reason.count(". ") >= 1, message


def _check_written(before: dict[str, str], folder: Path, target: Path) -> None:
    """The model, its report and perhaps its data are new; all else is as it was."""
    after = snapshot(folder)
    assert before.items() <= after.items(), "the input changed"
    base = target.relative_to(folder)
    wanted = {str(base), str(base.with_suffix(".json"))}
    assert after.keys() - before.keys() in (wanted, wanted | {f"{base}.data"})


def test_the_table_lists_every_case() -> None:
    for tried in every_case():
        wanted = "converted, " if tried.refused is None else tried.refused
        assert wanted in _rows()[tried.name].replace("&lt;", "<"), "run tests/hostile/corpus.py --write"


@functools.cache
def _rows() -> dict[str, str]:
    """What the table says happened, by the name of the case."""
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row != "| input | what happened |"]
    outcomes = {}
    for row, tried in zip(rows, every_case(), strict=True):
        what, _, outcomes[tried.name] = row.strip("| ").partition(" | ")
        assert what == tried.what.replace("<", "&lt;").replace("|", "\\|"), "run tests/hostile/corpus.py --write"
    return outcomes
