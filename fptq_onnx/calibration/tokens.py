"""Token ids from text files and a tokenizer.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fptq_onnx.errors import CalibrationError, why_unreadable

__all__ = [
    "decode_continuation",
    "encode_text",
    "encode_windows",
    "find_tokenizer",
    "load_tokenizer",
    "read_text",
    "token_windows",
]

TokenIds = npt.NDArray[np.int64]
PathLike = str | os.PathLike[str]


def read_text(path: PathLike) -> str:
    """Contents of a UTF-8 text file.

    Raises:
        CalibrationError: The file is missing, not UTF-8, or blank.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(str(path), why_unreadable(error), "Check the path") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(str(path), why_unreadable(error), "Convert it to UTF-8") from error
    if not text.strip():
        raise CalibrationError(str(path), "holds no text", "Give a text in the model's language")
    return text


def find_tokenizer(model_path: PathLike) -> Path | None:
    """The tokenizer.json beside a model file, if there is one."""
    path = Path(model_path).with_name("tokenizer.json")
    return path if path.is_file() else None


def load_tokenizer(path: PathLike) -> Tokenizer:
    """Load a tokenizer.json, or that of a directory.

    Truncation and padding that the file may ask for are turned off: they would drop text silently.

    Raises:
        CalibrationError: The file is missing or not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise CalibrationError(str(path), "there is no such file", "Give the tokenizer.json of the model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise CalibrationError(
            str(path), f"is not a tokenizer ({error})", "Give a tokenizer.json of Hugging Face tokenizers"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str, where: str = "text") -> TokenIds:
    """Ids [tokens] of a whole text, with the special tokens (BOS, EOS) that the tokenizer adds to a text.

    Raises:
        CalibrationError: The text gives no token.
    """
    return _checked(np.array(tokenizer.encode(text).ids, np.int64), where)


def encode_windows(tokenizer: Tokenizer, text: str, length: int, where: str = "text") -> TokenIds:
    """Ids [windows, length] of consecutive pieces of a text, each with the special tokens that the tokenizer adds.

    So each window starts as a prompt does (BOS, [CLS]), which decides the range of attention sinks. The rest that
    does not fill a window is dropped; a text shorter than one window is one window [1, tokens].

    Raises:
        CalibrationError: The text gives no token, or `length` leaves no room beside the special tokens.
    """
    special: int = tokenizer.num_special_tokens_to_add(is_pair=False)
    if length <= special:
        raise CalibrationError(
            where, f"windows of {length} hold nothing beside {special} special tokens", "Use longer windows"
        )
    tokenizer.enable_truncation(max_length=length)
    try:
        encoding = tokenizer.encode(text)
    finally:
        tokenizer.no_truncation()
    pieces: list[Any] = [encoding, *encoding.overflowing]
    full = [piece.ids for piece in pieces if len(piece.ids) == length]
    if not full:
        return _checked(np.array([encoding.ids], np.int64), where)
    return np.array(full, np.int64)


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """Text that token ids add to a prompt's; decoded alone they could lose the blank in front (SentencePiece)."""
    before, whole = tokenizer.decode(list(prompt)), tokenizer.decode([*prompt, *continuation])
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(list(continuation)))


def token_windows(token_ids: npt.ArrayLike, length: int, where: str = "text") -> TokenIds:
    """Consecutive windows [n, length] of token ids, without overlap; the rest is dropped.

    Args:
        token_ids: Ids of the whole text.
        length: Tokens per window.
        where: How to name the text in an error.

    Raises:
        CalibrationError: There are fewer than `length` ids.
    """
    ids = np.asarray(token_ids, np.int64).ravel()
    count = ids.size // length
    if count == 0:
        raise CalibrationError(
            where, f"holds {ids.size} tokens, less than one window of {length}", "Give more text or a shorter window"
        )
    return ids[: count * length].reshape(count, length)


def _checked(ids: TokenIds, where: str) -> TokenIds:
    if ids.size == 0:
        raise CalibrationError(where, "gives no token", "Give a text in the model's language")
    return ids
