"""Where calibration batches come from: text, .npz feeds, an onnxruntime reader, any iterable, or random tokens."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fptq_onnx.calibration.tokens import encode_windows, load_tokenizer, read_text
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import Feeds, ModelInputs

__all__ = [
    "CalibrationData",
    "CalibrationDataReader",
    "calibration_data",
    "feeds_data",
    "npz_data",
    "random_data",
    "reader_data",
    "text_data",
    "token_data",
]

PathLike = str | os.PathLike[str]
FeedsLike = Mapping[str, npt.NDArray[Any]]


@runtime_checkable
class CalibrationDataReader(Protocol):
    """What onnxruntime.quantization.CalibrationDataReader promises: feeds until None."""

    def get_next(self) -> FeedsLike | None:
        """The next batch, None after the last."""
        ...


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Batches to calibrate with, made one at a time while they are iterated.

    Attributes:
        source: The kind of data; "random" is data-free calibration, which a tool must announce.
        description: One line for the report.
        batches: Feeds by input name.
        count: Number of batches, None if unknown beforehand.
    """

    source: Literal["text", "npz", "reader", "feeds", "random"]
    description: str
    batches: Iterable[FeedsLike]
    count: int | None = None

    def __iter__(self) -> Iterator[FeedsLike]:
        """Iterate over the batches."""
        return iter(self.batches)

    def __length_hint__(self) -> int:
        """Number of batches for progress bars, 0 if unknown."""
        return self.count or 0


class _Chunks:
    """Rows of arrays in batches; can be iterated again."""

    def __init__(self, inputs: ModelInputs, arrays: FeedsLike, batch_size: int, where: str) -> None:
        self._inputs, self._arrays, self._where = inputs, arrays, where
        self._size = inputs.batch_size or batch_size
        self._rows = len(next(iter(arrays.values())))
        if self._rows % self._size and inputs.batch_size:
            raise CalibrationError(
                where,
                f"holds {self._rows} samples, but the model takes {self._size} at a time",
                "Give a multiple of it",
            )

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __iter__(self) -> Iterator[Feeds]:
        for start in range(0, self._rows, self._size):
            rows = slice(start, start + self._size)
            batch = {name: array[rows] for name, array in self._arrays.items()}
            yield self._inputs.complete(batch, f"{self._where}, samples {start}..{start + self._size - 1}")


def calibration_data(
    source: PathLike | CalibrationDataReader | Iterable[FeedsLike] | None,
    inputs: ModelInputs,
    *,
    tokenizer: PathLike | None = None,
    windows: int = 16,
    length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
) -> CalibrationData:
    """Open calibration data of any kind.

    Args:
        source: A text file, an .npz file, a CalibrationDataReader, an iterable of feeds, or None for random tokens.
        inputs: The inputs of the model.
        tokenizer: tokenizer.json or its folder; needed for text.
        windows: Most sequences to take from text, and how many to make of random tokens.
        length: Tokens per sequence, shortened to what the model takes; a fixed sequence length overrides it.
        batch_size: Sequences per batch; a model of fixed batch size overrides it.
        seed: Picks the windows of a text and the random tokens.

    Raises:
        CalibrationError: The data are missing, empty or do not fit the model.
    """
    if source is None:
        return random_data(inputs, windows=windows, length=length, batch_size=batch_size, seed=seed)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix == ".npz":
            return npz_data(inputs, path, batch_size=batch_size)
        if tokenizer is None:
            raise CalibrationError(
                str(path), "is text, and there is no tokenizer to read it with", "Give the model's tokenizer.json"
            )
        return text_data(inputs, path, tokenizer, windows=windows, length=length, batch_size=batch_size, seed=seed)
    if isinstance(source, CalibrationDataReader):
        return reader_data(source)
    if not isinstance(source, Iterable):
        raise CalibrationError(
            "calibration data", f"is a {type(source).__name__}", "Give a path, a CalibrationDataReader or feeds"
        )
    return feeds_data(source)


def text_data(
    inputs: ModelInputs,
    path: PathLike,
    tokenizer: PathLike,
    *,
    windows: int = 16,
    length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
) -> CalibrationData:
    """Windows of a text file, each as the tokenizer would encode it as a prompt (see `tokens.encode_windows`).

    A text of more than `windows` windows gives a random choice of them, in the order of the text.
    """
    length = inputs.window(length)
    every = encode_windows(load_tokenizer(tokenizer), read_text(path), length, str(path))
    chosen = every
    if len(every) > windows:
        chosen = every[np.sort(np.random.default_rng(seed).choice(len(every), windows, replace=False))]
    description = f"{len(chosen)} of {len(every)} windows of {every.shape[1]} tokens of {Path(path).name}"
    return token_data(inputs, chosen, "text", description, batch_size=batch_size, where=str(path))


def random_data(
    inputs: ModelInputs, *, windows: int = 16, length: int = 512, batch_size: int = 1, seed: int = 0
) -> CalibrationData:
    """Data-free calibration: tokens drawn uniformly from the vocabulary (FPTQ, arXiv 2308.15987)."""
    if inputs.token_input is None or not inputs.vocabulary:
        raise CalibrationError(
            "data-free calibration",
            "the model has no token embedding to draw random tokens for, or an empty one",
            "Calibrate with an .npz file of its inputs",
        )
    length = inputs.window(length)
    ids = np.random.default_rng(seed).integers(0, inputs.vocabulary, (windows, length), dtype=np.int64)
    description = f"{windows} windows of {length} random tokens (data-free, seed {seed})"
    return token_data(inputs, ids, "random", description, batch_size=batch_size, where="random tokens")


def token_data(
    inputs: ModelInputs,
    token_ids: npt.NDArray[np.int64],
    source: Literal["text", "feeds", "random"] = "feeds",
    description: str | None = None,
    *,
    batch_size: int = 1,
    where: str = "token ids",
) -> CalibrationData:
    """Batches of token ids [samples, length]."""
    if inputs.token_input is None:
        raise CalibrationError(where, "are token ids, which the model does not take", "Calibrate with an .npz file")
    arrays = {inputs.token_input.name: token_ids.astype(inputs.token_input.dtype or np.int64)}
    batches = _Chunks(inputs, arrays, batch_size, where)
    samples, length = token_ids.shape
    return CalibrationData(source, description or f"{samples} sequences of {length} tokens", batches, len(batches))


def npz_data(inputs: ModelInputs, path: PathLike, *, batch_size: int = 1) -> CalibrationData:
    """Feeds of an .npz file: one array [samples, ...] per input name.

    Inputs that follow from the token ids (attention mask, positions, empty cache) may be left out.

    Raises:
        CalibrationError: The file cannot be read, is empty, its arrays differ in samples or do not fit the model.
    """
    where = str(path)
    try:
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive")  # numpy would take it for a pickle and advise to trust it
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(where, f"is not a readable .npz file ({error})", "Write it with numpy.savez") from error
    samples = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    if not samples or 0 in samples.values():
        raise CalibrationError(where, "holds no sample", "Store one array [samples, ...] per input name")
    if len(set(samples.values())) > 1 or None in samples.values():
        raise CalibrationError(
            where, f"holds arrays of different numbers of samples {samples}", "Store [samples, ...] for every input"
        )
    batches = _Chunks(inputs, arrays, batch_size, where)
    count = next(iter(samples.values()))
    return CalibrationData("npz", f"{count} samples of {Path(path).name}", batches, len(batches))


def reader_data(reader: CalibrationDataReader) -> CalibrationData:
    """Batches of an onnxruntime CalibrationDataReader, each taken as it comes."""
    return CalibrationData("reader", f"batches of {type(reader).__name__}", _read(reader))


def feeds_data(feeds: Iterable[FeedsLike], description: str | None = None) -> CalibrationData:
    """Batches of any iterable of feeds."""
    count = len(feeds) if isinstance(feeds, list | tuple) else None
    text = description or ("batches given by the caller" if count is None else f"{count} batches given by the caller")
    return CalibrationData("feeds", text, feeds, count)


def _read(reader: CalibrationDataReader) -> Iterator[FeedsLike]:
    while (feeds := reader.get_next()) is not None:
        yield feeds
