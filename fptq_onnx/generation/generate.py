"""Greedy generation: the plain loop over a decoder, and what a model's folder says about starting and stopping it."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.evaluation.language_model import LanguageModel
from fptq_onnx.genai.config import CONFIG_NAME, GenaiConfig
from fptq_onnx.generation.decoder import Decoder

__all__ = ["Generated", "find_model", "generate", "stop_tokens"]


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        token_ids: New tokens of each prompt, a stop token included.
        prefill_tokens: Tokens of all prompts.
        prefill_seconds: Time to the first new token of every prompt.
        decode_steps: Runs of the model after the first; each gives one token per prompt.
        decode_seconds: Time of these runs.
    """

    token_ids: list[list[int]]
    prefill_tokens: int
    prefill_seconds: float
    decode_steps: int
    decode_seconds: float


def generate(
    model: LanguageModel,
    prompts: Sequence[npt.ArrayLike],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> Generated:
    """Continue prompts greedily: the most likely token each time, the lowest id among equals.

    Args:
        model: A causal language model with a key/value cache, from `open_language_model`.
        prompts: Token ids of each prompt; they run as one batch and may differ in length.
        max_new_tokens: Most tokens to add to each prompt.
        stop: Token ids that end a sequence, see `stop_tokens`.

    Raises:
        ModelError: The model has no cache.
        CalibrationError: A prompt does not fit the model.
    """
    if max_new_tokens < 1:
        raise CalibrationError("max_new_tokens", f"is {max_new_tokens}", "Ask for at least one token")
    decoder = Decoder(model)
    stops = np.array(sorted(stop), np.int64)
    lengths = [np.size(prompt) for prompt in prompts]
    started = time.perf_counter()
    # The last token is only read off the logits, never run.
    tokens = decoder.start(prompts, max(lengths, default=0) + max_new_tokens - 1).argmax(axis=1)
    prefilled = time.perf_counter()
    columns = [tokens]
    done = np.isin(tokens, stops)
    while len(columns) < max_new_tokens and not done.all():
        tokens = decoder.extend(tokens).argmax(axis=1)
        columns.append(tokens)
        done |= np.isin(tokens, stops)
    rows = [_until(row, stops) for row in np.stack(columns, axis=1)]
    return Generated(rows, sum(lengths), prefilled - started, len(columns) - 1, time.perf_counter() - prefilled)


def find_model(path: Path) -> Path:
    """Return the decoder's ONNX file: `path` itself, or of a folder the one that its genai_config.json names.

    Raises:
        ModelError: There is no such file, or a folder holds neither that nor a model.onnx.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(str(path), "there is no such file", "Check the path")
    if (path / CONFIG_NAME).is_file():
        return path / GenaiConfig.load(path).filename
    if (path / "model.onnx").is_file():
        return path / "model.onnx"
    raise ModelError(str(path), f"holds neither {CONFIG_NAME} nor model.onnx", "Give the path of the .onnx file")


def stop_tokens(folder: Path) -> frozenset[int]:
    """Token ids that end a text, as the configuration files beside a model say; empty if none says so.

    Reads genai_config.json, else generation_config.json, else config.json (Hugging Face).

    Raises:
        ModelError: The first of them that is there cannot be read.
    """
    if (folder / CONFIG_NAME).is_file():
        return GenaiConfig.load(folder).stop_tokens
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(str(folder / name), f"cannot be read ({error})", "Copy it from the model again") from error
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def _until(row: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> list[int]:
    ends = np.flatnonzero(np.isin(row, stops))
    return [int(token) for token in (row[: ends[0] + 1] if ends.size else row)]
