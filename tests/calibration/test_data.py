"""Every kind of calibration data gives complete batches or one clear error."""

from __future__ import annotations

import families
import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from whole_model import calibrate

from fptq_onnx.calibration.data import calibration_data, feeds_data, npz_data, random_data, reader_data, text_data
from fptq_onnx.calibration.tokens import (
    decode_continuation,
    encode_text,
    encode_windows,
    find_tokenizer,
    load_tokenizer,
    read_text,
    token_windows,
)
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import ModelInput, ModelInputs, describe_inputs

INT64 = np.dtype(np.int64)
INPUTS = ModelInputs((ModelInput("input_ids", INT64, ("b", "s")), ModelInput("attention_mask", INT64, ("b", "s"))), 20)
WORDS = ["[CLS]", "[SEP]", *"abcdefghij"]


@pytest.fixture
def tokenizer(tmp_path):
    """Words to ids, [CLS] before and [SEP] after a text; the file asks for truncation and padding, as BERT's do."""
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[SEP]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    built.enable_truncation(max_length=4)
    built.enable_padding(length=6)
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h i j " * 3, encoding="utf-8")
    return path


def test_whole_text_is_encoded_whatever_the_file_asks_for(tokenizer):
    ids = encode_text(load_tokenizer(tokenizer.parent), "a b c d e f g h")
    assert ids.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 1] and ids.dtype == np.int64


def test_each_window_starts_as_a_prompt(tokenizer, text):
    loaded = load_tokenizer(tokenizer)
    windows = encode_windows(loaded, read_text(text), 12)
    assert windows.tolist() == [[0, *range(2, 12), 1]] * 3
    assert encode_windows(loaded, "a b c d e f g", 5).tolist() == [[0, 2, 3, 4, 1], [0, 5, 6, 7, 1]]  # g is dropped
    assert encode_windows(loaded, "a b", 5).tolist() == [[0, 2, 3, 1]]  # shorter than a window
    assert len(encode_text(loaded, "a b c d e f g")) == 9  # truncation is off again


def test_text_gives_a_seeded_choice_of_windows(tokenizer, text):
    def ids(**options):
        data = text_data(INPUTS, text, tokenizer, length=4, **options)
        return data, np.concatenate([batch["input_ids"] for batch in data])

    data, every = ids(windows=100, batch_size=4)
    assert every.shape == (15, 4) and data.source == "text" and data.count == 4
    assert data.description == "15 of 15 windows of 4 tokens of text.txt"
    data, chosen = ids(windows=6, seed=3)
    assert data.description.startswith("6 of 15 windows") and data.count == 6
    positions = [np.flatnonzero((every == row).all(1)) for row in chosen]
    assert all(len(p) for p in positions)
    assert np.array_equal(chosen, ids(windows=6, seed=3)[1])
    assert not np.array_equal(chosen, ids(windows=6, seed=4)[1])
    assert all(batch["attention_mask"].all() for batch in data)


def test_random_tokens_announce_themselves():
    data = random_data(INPUTS, windows=5, length=8, batch_size=2, seed=1)
    batches = [batch["input_ids"] for batch in data]
    assert [len(batch) for batch in batches] == [2, 2, 1] and data.count == 3
    assert data.source == "random" and "data-free, seed 1" in data.description
    ids = np.concatenate(batches)
    assert ids.min() >= 0 and ids.max() < 20 and len(np.unique(ids)) > 10
    again = np.concatenate([batch["input_ids"] for batch in data])
    np.testing.assert_array_equal(ids, again)


def test_fixed_dimensions_override():
    fixed = ModelInputs((ModelInput("input_ids", INT64, (2, 6)),), 20)
    data = random_data(fixed, windows=4, length=99, batch_size=1)
    assert [batch["input_ids"].shape for batch in data] == [(2, 6), (2, 6)]
    with pytest.raises(CalibrationError, match="holds 3 samples, but the model takes 2 at a time"):
        random_data(fixed, windows=3)


def test_npz_feeds(tmp_path):
    path = tmp_path / "feeds.npz"
    ids = np.arange(15).reshape(5, 3)
    mask = np.array([[1, 1, 0]] * 5)
    np.savez(path, input_ids=ids, attention_mask=mask)
    data = npz_data(INPUTS, path, batch_size=2)
    batches = list(data)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1] and data.count == 3
    np.testing.assert_array_equal(np.concatenate([batch["attention_mask"] for batch in batches]), mask)
    assert (data.source, data.description) == ("npz", "5 samples of feeds.npz")
    np.savez(path, input_ids=ids)
    assert next(iter(npz_data(INPUTS, path)))["attention_mask"].tolist() == [[1, 1, 1]]


class Reader:
    """As onnxruntime.quantization.CalibrationDataReader."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(self.batches, None)


def _activation(model):
    return next(n.inputs[0].name for n in model.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer())


@pytest.mark.parametrize("wrap", [list, iter, Reader, tuple])
def test_every_batch_of_readers_and_iterables_counts(wrap, tiny_llama):
    model = ir.load(tiny_llama.path)
    ids = tiny_llama.token_ids(5, 6)
    data = calibration_data(wrap([{"input_ids": ids[:2]}, {"input_ids": ids[2:3]}, {"input_ids": ids[3:]}]),
                            describe_inputs(model))  # fmt: skip
    assert data.source == ("reader" if wrap is Reader else "feeds") and data.description
    assert data.count == (3 if wrap in (list, tuple) else None)
    name = _activation(model)
    assert calibrate(model, [name], data)[name].all.tokens == 30


def test_onnxruntime_readers_are_readers():
    from onnxruntime.quantization import CalibrationDataReader as OrtReader

    class Mine(OrtReader):
        def get_next(self):
            return None

    assert calibration_data(Mine(), INPUTS).source == "reader"


def test_dispatch(tokenizer, text, tmp_path):
    assert calibration_data(None, INPUTS).source == "random"
    assert calibration_data(str(text), INPUTS, tokenizer=tokenizer, length=4).source == "text"
    np.savez(tmp_path / "x.npz", input_ids=np.ones((1, 2), np.int64))
    assert calibration_data(tmp_path / "x.npz", INPUTS).source == "npz"
    with pytest.raises(CalibrationError, match="there is no tokenizer to read it with"):
        calibration_data(text, INPUTS)


def test_tokenizer_beside_the_model(tokenizer):
    assert find_tokenizer(tokenizer.with_name("model.onnx")) == tokenizer
    assert find_tokenizer(tokenizer.parent / "elsewhere" / "model.onnx") is None


def test_windows_of_token_ids():
    assert token_windows(np.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(CalibrationError, match="holds 3 tokens, less than one window of 4"):
        token_windows(np.arange(3), 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no text"),
        (b" \n\t ", "holds no text"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (None, "there is no such file"),
    ],
)
def test_bad_text(tmp_path, tokenizer, content, reason):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"bad.txt: {reason}"):
        calibration_data(path, INPUTS, tokenizer=tokenizer)


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_bad_tokenizer(tmp_path, text, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalibrationError, match=r"other\.json: (there is no such file|is not a tokenizer)"):
        calibration_data(text, INPUTS, tokenizer=path)


def test_wrong_tokenizer_and_windows(tokenizer, text):
    small = ModelInputs(INPUTS.inputs, vocabulary=5)
    with pytest.raises(CalibrationError, match=r"text.txt, samples 0..0: holds token id \d+, outside the model's"):
        list(text_data(small, text, tokenizer, length=8))
    with pytest.raises(CalibrationError, match="windows of 2 hold nothing beside 2 special tokens"):
        text_data(INPUTS, text, tokenizer, length=2)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "holds no sample"),
        ({"input_ids": np.zeros((0, 3), np.int64)}, "holds no sample"),
        ({"input_ids": np.int64(3)}, "different numbers of samples"),
        ({"input_ids": np.ones((2, 3), int), "attention_mask": np.ones((3, 3), int)}, "different numbers of samples"),
        ({"input_ids": np.ones((2, 3), np.float32)}, "input input_ids: has type float32"),
        ({"input_ids": np.ones(4, int)}, r"input input_ids: has shape \[1\]"),
        ({"other": np.ones((2, 3))}, "holds other, which the model does not take"),
        ({"attention_mask": np.ones((2, 3), int)}, "input input_ids: is missing"),
        ({"input_ids": np.array([[object()]], object)}, "is not a readable .npz file"),
    ],
)
def test_bad_npz(tmp_path, arrays, reason):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(CalibrationError, match=f"bad.npz.*{reason}"):
        list(npz_data(INPUTS, path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"text"])
def test_npz_that_is_none(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"bad\.npz: is not a readable \.npz file"):
        npz_data(INPUTS, path)
    with pytest.raises(CalibrationError, match=r"absent\.npz: is not a readable"):
        npz_data(INPUTS, tmp_path / "absent.npz")


def test_models_without_tokens():
    pixels = ModelInputs((ModelInput("x", np.dtype(np.float32), ("b", 4)),))
    with pytest.raises(CalibrationError, match="no token embedding to draw random tokens for"):
        random_data(pixels)


def test_readers_and_feeds_that_are_empty_or_wrong():
    model = ir.load(families.model("llama", families.DYNAMO).path)
    for data in (reader_data(Reader([])), feeds_data([])):
        with pytest.raises(CalibrationError, match="calibration data: hold no batch"):
            calibrate(model, [_activation(model)], data)
    with pytest.raises(CalibrationError, match="calibration batch 1: is a list"):
        calibrate(model, [_activation(model)], feeds_data([[1, 2]]))


def test_a_continuation_keeps_the_blank_in_front():
    """Decoders of SentencePiece's kind strip it from the first token of what they are given."""
    pieces = ["<s>", "▁Once", "▁upon", "▁a", "▁time", ","]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<s>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([3, 4]) == "a time"
    assert decode_continuation(tokenizer, [0, 1, 2], [3, 4]) == " a time"
    assert decode_continuation(tokenizer, [0, 1, 2], [5]) == ","
    assert decode_continuation(tokenizer, [0], [1]) == "Once"
    assert decode_continuation(tokenizer, [1], []) == ""
