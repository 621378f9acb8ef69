"""The detokenizer, the split, and what happens when a package is not what it should be."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools import assets

# Perplexities are only comparable on the same bytes.
EVALUATION_SHA256 = "1207e7342cc44823edd8c4cac079b243874c8a686c29885921ad9534a8412831"


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("The/at jury/nn said/vbd Friday/nr ,/, it/pps had/hvd ./.", "The jury said Friday, it had."),
        ("``/`` No/at evidence/nn ''/'' ,/, he/pps said/vbd ./.", "`` No evidence '', he said."),
        ("Why/wrb not/* ?/. ?/.", "Why not??"),
        ("It/pps is/bez (/( they/ppss say/vb )/) so/rb !/. !/.", "It is ( they say ) so!!"),
        ("one/cd and/or/cc 1-1/2/cd ;/. ;/.", "one and/or 1-1/2;;"),
        ("Atlanta's/np$ 5/cd %/nn --/-- more/ap", "Atlanta's 5 % -- more"),
        ("\n\tTwo/cd ./.\n\n\n\tThree/cd ./.\n", "Two. Three."),
        ("", ""),
    ],
)
def test_detokenize(tagged: str, text: str) -> None:
    assert assets.detokenize(tagged) == text


def test_split_is_every_16th_sample_and_8_after() -> None:
    samples = {f"c{index:03}": f"word{index}/nn ./." for index in range(40)}
    evaluation, calibration = assets.split_samples(samples)
    assert evaluation == "word0.\n\nword16.\n\nword32."
    assert calibration == "word8.\n\nword24."


def _package(content: bytes) -> assets.Package:
    script = f"open('package', 'wb').write({content!r})"
    return assets.Package("a package", (sys.executable, "-c", script), "package", hashlib.sha256(content).hexdigest())


def _copy(archive: Path, target: Path) -> None:
    (target / "content").write_bytes(archive.read_bytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPTQ_CACHE", str(tmp_path))
    return tmp_path


def test_asset_is_fetched_once(cache: Path) -> None:
    package = _package(b"text")
    folder = assets.unpacked(package, "thing", _copy, "Fetching", None)
    assert (folder / "content").read_bytes() == b"text"
    again = replace(package, command=("this command does not exist",))
    assert assets.unpacked(again, "thing", _copy, "Fetching", None) == folder


def test_wrong_checksum_leaves_nothing(cache: Path) -> None:
    package = replace(_package(b"text"), sha256="0" * 64)
    with pytest.raises(assets.AssetError, match="SHA-256 is 982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a8"):
        assets.unpacked(package, "thing", _copy, "Fetching", None)
    assert not list((cache / "assets").iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("this-command-does-not-exist",), "is not installed"),
        ((sys.executable, "-c", "raise SystemExit('no such version')"), "no such version"),
        ((sys.executable, "-c", ""), "package was not delivered"),
    ],
)
def test_failing_client(cache: Path, command: tuple[str, ...], message: str) -> None:
    with pytest.raises(assets.AssetError, match=re.escape(message)):
        assets.unpacked(replace(_package(b""), command=command), "thing", _copy, "Fetching", None)


@pytest.mark.slow
def test_brown_text_is_the_one_the_figures_are_for() -> None:
    text = assets.brown_text()
    evaluation = text.evaluation.read_text(encoding="utf-8")
    calibration = text.calibration.read_text(encoding="utf-8")
    assert evaluation.startswith(
        "The Fulton County Grand Jury said Friday an investigation of Atlanta's recent primary"
    )
    assert len(evaluation.split("\n\n")) == 32 and len(calibration.split("\n\n")) == 31
    assert hashlib.sha256(evaluation.encode()).hexdigest() == EVALUATION_SHA256
    assert not set(evaluation.split("\n\n")) & set(calibration.split("\n\n"))


@pytest.mark.slow
def test_training_text_holds_nothing_that_is_evaluated() -> None:
    training = set(assets.training_text().read_text(encoding="utf-8").split("\n\n"))
    text = assets.brown_text()
    for path in (text.evaluation, text.calibration, assets.speeches()):
        assert not training & set(path.read_text(encoding="utf-8").split("\n\n"))
    assert len(training) == 437 + 220
