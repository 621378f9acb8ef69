"""Calibration data that are missing, empty, broken, or of another model; recipes and plans that do not fit."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import base_model
import numpy as np
from case import Attempt, case

from fptq_onnx.errors import CalibrationError, RecipeError

_DATA = "Calibration data"
_SETTINGS = "Recipe and plan"


def _with(folder: Path, calibration: Any, **options: Any) -> Attempt:
    path = base_model.save(base_model.model(), folder / "model.onnx")
    return Attempt(path, options={"calibration": calibration} | options)


def _file(folder: Path, name: str, content: bytes, tokenizer: bytes | None = None) -> Attempt:
    (folder / name).write_bytes(content)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer)
    return _with(folder, folder / name)


def _tokenizer(words: int = 40, first_id: int = 0) -> bytes:
    """A tokenizer.json that knows the words w0, w1, ... under consecutive ids."""
    vocabulary = {f"w{i}": first_id + i for i in range(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}).encode()


def _npz(folder: Path, **arrays: Any) -> Attempt:
    np.savez(folder / "feeds.npz", **arrays)
    return _with(folder, folder / "feeds.npz")


@case(_DATA, "no such file", "there is no such file", error=CalibrationError)
def missing_text(folder: Path) -> Attempt:
    attempt = _file(folder, "text.txt", b"", _tokenizer())
    (folder / "text.txt").unlink()
    return attempt


@case(_DATA, "a folder", "cannot be read (Is a directory)", error=CalibrationError)
def folder_for_text(folder: Path) -> Attempt:
    attempt = _file(folder, "text.txt", b"", _tokenizer())
    (folder / "text.txt").unlink()
    (folder / "text.txt").mkdir()
    return attempt


@case(_DATA, "an empty text", "holds no text", error=CalibrationError)
def empty_text(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"", _tokenizer())


@case(_DATA, "a text of blanks", "holds no text", error=CalibrationError)
def blank_text(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b" \n\t " * 99, _tokenizer())


@case(_DATA, "a text that is not UTF-8", "is not UTF-8 text", error=CalibrationError)
def latin_text(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"caf\xe9 " * 99, _tokenizer())


@case(_DATA, "a text without a tokenizer", "there is no tokenizer to read it with", error=CalibrationError)
def no_tokenizer(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"w1 w2 " * 99)


@case(_DATA, "a tokenizer.json that is no tokenizer", "is not a tokenizer", error=CalibrationError)
def broken_tokenizer(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"w1 w2 " * 99, b'{"model_type": "llama"}')


@case(
    _DATA, "the tokenizer of a model with a larger vocabulary", "outside the model's vocabulary", error=CalibrationError
)
def larger_tokenizer(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"w1 w2 w99 " * 99, _tokenizer(100))


@case(_DATA, "a sound text and tokenizer", None)
def sound_text(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"w1 w2 w3 w39 " * 99, _tokenizer())


@case(_DATA, "a text shorter than one window", None)
def short_text(folder: Path) -> Attempt:
    return _file(folder, "text.txt", b"w1 w2 w3", _tokenizer())


@case(_DATA, "no batch at all", "hold no batch", error=CalibrationError)
def no_batch(folder: Path) -> Attempt:
    return _with(folder, [])


@case(_DATA, "a batch that is no set of feeds", "is a list", error=CalibrationError)
def batch_of_nothing(folder: Path) -> Attempt:
    return _with(folder, [[1, 2, 3]])


@case(_DATA, "feeds that are lists", "is a list, not a numpy array", error=CalibrationError)
def feeds_of_lists(folder: Path) -> Attempt:
    return _with(folder, [{"input_ids": [[1, 2, 3]]}])


@case(_DATA, "a data source that is a number", "is a int", error=CalibrationError)
def number_for_data(folder: Path) -> Attempt:
    attempt = _with(folder, 5)
    attempt.options["verify_tokens"] = 0
    attempt.options["progress"] = None  # Python only: the shell would read a file named 5
    return attempt


@case(
    _DATA,
    "token ids beyond the vocabulary",
    "holds token id 67, outside the model's vocabulary 0..66",
    error=CalibrationError,
)
def ids_too_high(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.array([[1, 2, 67]]))


@case(_DATA, "negative token ids", "holds token id -1, outside the model's vocabulary", error=CalibrationError)
def ids_negative(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.array([[1, -1, 5]]))


@case(_DATA, "token ids as floats", "has type float32 where the model takes int64", error=CalibrationError)
def ids_as_floats(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.ones((1, 3), np.float32))


@case(_DATA, "token ids of one dimension", "has shape", error=CalibrationError)
def ids_flat(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.ones(5, np.int64))


@case(_DATA, "sequences of no token", "holds no token", error=CalibrationError)
def ids_of_no_token(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.ones((2, 0), np.int64))


@case(_DATA, "an .npz without a sample", "holds no sample", error=CalibrationError)
def npz_without_sample(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.ones((0, 5), np.int64))


@case(_DATA, "an .npz without an array", "holds no sample", error=CalibrationError)
def npz_without_array(folder: Path) -> Attempt:
    return _npz(folder)


@case(
    _DATA, "an .npz with a name that the model does not know", "which the model does not take", error=CalibrationError
)
def npz_of_other_names(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.ones((2, 5), np.int64), pixels=np.ones((2, 5), np.float32))


@case(_DATA, "an .npz of pickled objects", "is not a readable .npz file", error=CalibrationError)
def npz_of_objects(folder: Path) -> Attempt:
    return _npz(folder, input_ids=np.array([{"a": 1}, None], dtype=object))


@case(_DATA, "an .npz that is text", "is not a readable .npz file", error=CalibrationError)
def npz_of_text(folder: Path) -> Attempt:
    return _file(folder, "feeds.npz", b"not a zip")


@case(_DATA, "an .npz cut in half", "is not a readable .npz file", error=CalibrationError)
def npz_cut(folder: Path) -> Attempt:
    attempt = _npz(folder, input_ids=np.ones((20, 50), np.int64))
    path = folder / "feeds.npz"
    path.write_bytes(path.read_bytes()[:-100])
    return attempt


def _npy_in_npz(folder: Path, header: str, data: bytes = b"", method: int = zipfile.ZIP_STORED) -> Attempt:
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "feeds.npz", "w", method) as file:
        file.writestr("input_ids.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)
    return _with(folder, folder / "feeds.npz")


@case(_DATA, "an .npz whose header promises 8 EB", "is not a readable .npz file", error=CalibrationError)
def npz_that_promises(folder: Path) -> Attempt:
    return _npy_in_npz(folder, "{'descr': '<i8', 'fortran_order': False, 'shape': (1073741824, 1073741824)}")


@case(_DATA, "an .npz whose header is code", "is not a readable .npz file", error=CalibrationError)
def npz_of_code(folder: Path) -> Attempt:
    return _npy_in_npz(folder, "__import__('os').system('touch /tmp/owned')")


@case(_DATA, "an .npz with a damaged checksum", "is not a readable .npz file", error=CalibrationError)
def npz_damaged(folder: Path) -> Attempt:
    attempt = _npz(folder, input_ids=np.ones((20, 50), np.int64))
    path = folder / "feeds.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(bytes(content))
    return attempt


# ---- recipe and plan -------------------------------------------------------------------------------------------------


def _plan(folder: Path, content: str) -> Attempt:
    (folder / "plan.json").write_text(content)
    return _with(folder, None, plan=folder / "plan.json")


def _shell_plan(folder: Path, content: str) -> Attempt:
    attempt = _plan(folder, content)
    del attempt.options["calibration"]
    return attempt


@case(_SETTINGS, "a plan that is no JSON", "plan.json", error=RecipeError)
def plan_no_json(folder: Path) -> Attempt:
    return _shell_plan(folder, "{")


@case(_SETTINGS, "a plan of 100,000 nested brackets", "plan.json", error=RecipeError)
def plan_of_brackets(folder: Path) -> Attempt:
    return _shell_plan(folder, "[" * 100_000)


@case(_SETTINGS, "a plan that is a list", "plan.json", error=RecipeError)
def plan_list(folder: Path) -> Attempt:
    return _shell_plan(folder, "[1, 2]")


@case(_SETTINGS, "a plan that is binary", "plan.json", error=RecipeError)
def plan_binary(folder: Path) -> Attempt:
    attempt = _shell_plan(folder, "")
    (folder / "plan.json").write_bytes(b"\xff\xfe\x00")
    return attempt


@case(_SETTINGS, "a plan that is missing", "plan.json", error=RecipeError)
def plan_missing(folder: Path) -> Attempt:
    attempt = _shell_plan(folder, "")
    (folder / "plan.json").unlink()
    return attempt
