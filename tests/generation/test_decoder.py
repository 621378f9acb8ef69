"""Decoding through the cache equals running everything at once, in every decoder family, float and converted."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
from conversions import EXACT, converted, relative_error

from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.evaluation.language_model import LanguageModel, open_language_model
from fptq_onnx.generation.decoder import Decoder

DECODERS = [
    (architecture, family)
    for architecture, family in families.ALL_MODELS
    if family != families.DYNAMO and not architecture.startswith("bert")
]
IDS = [f"{architecture}-{family}" for architecture, family in DECODERS]


def _open(path: Path, *, library: bool | None = None) -> LanguageModel:
    return open_language_model(path, threads=1, register_library=library, config=EXACT)


def _whole(model: LanguageModel, ids: np.ndarray) -> np.ndarray:
    """Logits [V] after `ids` [S], run at once from an empty cache."""
    return model.run(np.asarray(ids), "test")[0][-1].astype(np.float32)


def _check(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) < tolerance


@pytest.mark.parametrize(("architecture", "family"), DECODERS, ids=IDS)
def test_float_model_gives_the_logits_of_a_run_without_cache(architecture: str, family: str) -> None:
    """Float arithmetic of any two shapes differs in the last bits, by more in float16."""
    tiny = families.model(architecture, family)
    model = _open(tiny.path)
    decoder = Decoder(model)
    tolerance = 2e-2 if tiny.dtype == "float16" else 1e-4
    ids = tiny.token_ids(batch=2, length=9)
    _check(decoder.start(list(ids[:, :5]), capacity=9)[0].astype(np.float32), _whole(model, ids[0, :5]), tolerance)
    for position in (5, 6, 7, 8):
        logits = decoder.extend(ids[:, position]).astype(np.float32)
        for row in (0, 1):
            _check(logits[row], _whole(model, ids[row, : position + 1]), tolerance)
    assert decoder.length == 9


@pytest.mark.parametrize("library", [True, False], ids=["kernels", "functions"])
@pytest.mark.parametrize(("architecture", "family"), DECODERS, ids=IDS)
def test_converted_model_gives_the_logits_of_a_run_without_cache(architecture: str, family: str, library: bool) -> None:
    """At past length 0 and over it, with prompts of one length and of several.

    An int8 value on a rounding border may fall to either side, so the bound is wider than a float model's; a wrong
    position, mask or cache is off by the size of the logits.
    """
    model = _open(converted(architecture, family).path, library=library)
    decoder = Decoder(model)
    ids = families.model(architecture, family).token_ids(batch=3, length=10)
    for lengths in ((6, 6, 6), (6, 2, 4)):
        logits = decoder.start([row[:length] for row, length in zip(ids, lengths, strict=True)], capacity=10)
        for step in range(4):
            for row, length in enumerate(lengths):
                _check(logits[row].astype(np.float32), _whole(model, ids[row, : length + step]), 0.05)
            logits = decoder.extend([ids[row, length + step] for row, length in enumerate(lengths)])


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32])
def test_several_tokens_after_a_past(family: str) -> None:
    tiny = families.model("llama", family)
    model = _open(tiny.path)
    decoder = Decoder(model)
    ids = tiny.token_ids(batch=1, length=11)
    decoder.start(list(ids[:, :4]), capacity=11)
    _check(decoder.extend(ids[:, 4:9])[0], _whole(model, ids[0, :9]), 1e-4)
    _check(decoder.extend(ids[:, 9])[0], _whole(model, ids[0, :10]), 1e-4)


def test_a_cache_in_place_is_one_buffer_per_layer() -> None:
    """GroupQueryAttention appends in the buffer given to `start`; other graphs get a new, longer one per step."""
    for family, in_place in ((families.GENAI_FP32, True), (families.DYNAMO_KV, False)):
        decoder = Decoder(_open(families.model("llama", family).path))
        decoder.start([[1, 2, 3]], capacity=8)
        before = {name: value.data_ptr() for name, value in decoder._cache.items()}
        decoder.extend([4])
        shapes = {value.shape()[2] for value in decoder._cache.values()}
        assert len(before) == 2 * families.BLOCKS
        assert shapes == ({8} if in_place else {4})
        assert in_place == (before == {name: value.data_ptr() for name, value in decoder._cache.items()})


def test_bad_input_is_refused() -> None:
    decoder = Decoder(_open(families.model("llama", families.DYNAMO_KV).path))
    with pytest.raises(CalibrationError, match="holds no token"):
        decoder.start([[1], []], capacity=4)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary"):
        decoder.start([[families.VOCABULARY]], capacity=4)
    decoder.start([[1, 2]], capacity=3)
    with pytest.raises(CalibrationError, match="in a batch of 1"):
        decoder.extend([1, 2])
    decoder.extend([1])
    with pytest.raises(CalibrationError, match="capacity of 3 tokens"):
        decoder.extend([1])


def test_positions_are_limited_by_the_model() -> None:
    decoder = Decoder(_open(families.model("llama", families.GENAI_FP32).path))
    with pytest.raises(CalibrationError, match="take 513 tokens, the model has 512 positions"):
        decoder.start([[1, 2]], capacity=513)


def test_a_model_without_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="has no input of a key/value cache"):
        Decoder(_open(families.model("llama", families.DYNAMO).path))
