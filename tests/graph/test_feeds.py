"""Complete feeds from token ids, for every exporter's input names, and clear errors for what does not fit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import ModelInput, ModelInputs, describe_inputs, describe_session

INT64, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int64)


def inputs_of(*inputs: ModelInput, vocabulary: int | None = None) -> ModelInputs:
    return ModelInputs((ModelInput("input_ids", INT64, ("b", "s")), *inputs), vocabulary)


def test_every_family_is_fed_from_token_ids_alone(tiny_model):
    inputs = describe_inputs(ir.load(tiny_model.path))
    ids = tiny_model.token_ids(batch=2, length=7)
    feeds, expected = inputs.feeds(ids), tiny_model.feeds(ids)
    assert feeds.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(feeds[name], array, err_msg=name)
        assert feeds[name].dtype == array.dtype, name
    assert inputs.vocabulary == tiny_model.vocab_size
    # Rotary positions are computed in dynamo graphs; all others hold a table, see families.py for its rows.
    if tiny_model.family.startswith("genai"):
        assert inputs.positions == 512
    else:
        assert inputs.positions == (256 if tiny_model.architecture in ("gpt2", "bert", "bert-classifier") else None)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(tiny_model.path, options).run(None, feeds)


def test_session_and_graph_agree(tiny_llama):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    described = describe_session(onnxruntime.InferenceSession(tiny_llama.path, options))
    model = describe_inputs(ir.load(tiny_llama.path))
    assert described.names == model.names
    assert [spec.dtype for spec in described.inputs] == [spec.dtype for spec in model.inputs]
    assert described.vocabulary is None


def test_left_padding_moves_positions():
    inputs = inputs_of(
        ModelInput("attention_mask", INT64, ("b", "t")),
        ModelInput("position_ids", INT64, ("b", "s")),
        ModelInput("token_type_ids", INT64, ("b", "s")),
    )
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    feeds = inputs.feeds(IDS, mask)
    np.testing.assert_array_equal(feeds["attention_mask"], mask)
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert not feeds["token_type_ids"].any()
    np.testing.assert_array_equal(inputs.token_positions(feeds), [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_positions_count_a_past():
    inputs = inputs_of(ModelInput("attention_mask", INT64, ("b", "t")))
    feeds = {"input_ids": IDS, "attention_mask": np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])}
    np.testing.assert_array_equal(inputs.token_positions(feeds), [[1, 2, 3, 4, 5], [2, 3, 4, 5, -1]])


def test_positions_after_a_past_are_filled():
    inputs = inputs_of(
        ModelInput("attention_mask", INT64, ("b", "t")),
        ModelInput("position_ids", INT64, ("b", "s")),
        ModelInput("cache_position", INT64, ("s",)),
    )
    mask = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]])
    feeds = inputs.complete({"input_ids": IDS, "attention_mask": mask}, "test")
    np.testing.assert_array_equal(feeds["position_ids"], [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(feeds["cache_position"], [2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(("b", 4, "p", 16), (2, 4, 0, 16)), (("b", "p", 4, 16), (2, 0, 4, 16)), ((2, 4, "p", 16), (2, 4, 0, 16))],
)
@pytest.mark.parametrize("name", ["past_key_values.0.key", "past_key_values_key_0", "past_key_values_0_value"])
def test_empty_caches_of_any_layout(name, shape, expected):
    cache = inputs_of(ModelInput(name, np.dtype(np.float16), shape)).feeds(IDS)[name]
    assert cache.shape == expected and cache.dtype == np.float16


def test_switches_of_optimum_exports():
    feeds = inputs_of(
        ModelInput("use_cache_branch", np.dtype(np.bool_), (1,)), ModelInput("num_logits_to_keep", INT64, ())
    ).feeds(IDS)
    assert feeds["use_cache_branch"].tolist() == [False] and feeds["num_logits_to_keep"].shape == ()


@pytest.mark.parametrize(
    "extra",
    [
        ModelInput("pixel_values", FLOAT, ("b", 3, 8, 8)),
        ModelInput("past_key_values.0.key", FLOAT, ("b", 4, 32, 16)),
        ModelInput("past_key_values.0.key", FLOAT, ("b", "h", "p", "d")),
        ModelInput("attention_mask", FLOAT, ("b", 1, "s", "s")),
    ],
)
def test_what_does_not_follow_from_tokens_is_named(extra):
    with pytest.raises(CalibrationError, match=f"{extra.name}: is missing and does not follow"):
        inputs_of(extra).feeds(IDS)


@pytest.mark.parametrize(("ids", "reason"), [([[0, 323]], "token id 323"), ([[-1, 5]], "token id -1")])
def test_ids_outside_the_vocabulary(ids, reason):
    with pytest.raises(CalibrationError, match=f"{reason}, outside the model's vocabulary 0..322"):
        inputs_of(vocabulary=323).feeds(np.array(ids))


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({"input_ids": IDS.astype(np.int32)}, "has type int32 where the model takes int64"),
        ({"input_ids": IDS[0]}, r"has shape \[5\] where the model takes \[b, s\]"),
        ({"input_ids": IDS.tolist()}, "is a list, not a numpy array"),
        ({"input_ids": IDS, "mask": IDS}, "holds mask, which the model does not take"),
        ({"input_ids": IDS[:0]}, "holds no token"),
        ({}, "input_ids: is missing"),
    ],
)
def test_feeds_that_do_not_fit(feeds, reason):
    with pytest.raises(CalibrationError, match=f"^batch 7.*{reason}"):
        inputs_of().complete(feeds, "batch 7")


def test_fixed_dimensions():
    inputs = ModelInputs((ModelInput("input_ids", INT64, (1, 5)),))
    assert (inputs.batch_size, inputs.sequence_length) == (1, 5)
    with pytest.raises(CalibrationError, match=r"has shape \[2, 5\] where the model takes \[1, 5\]"):
        inputs.feeds(IDS)


def test_windows_fit_the_model():
    free, fixed = inputs_of(), ModelInputs((ModelInput("input_ids", INT64, (1, 5)),), positions=3)
    assert (free.window(99), fixed.window(99)) == (99, 5)
    assert [ModelInputs(free.inputs, positions=64).window(length) for length in (32, 128)] == [32, 64]


def test_padding_without_a_mask_input_is_refused():
    with pytest.raises(CalibrationError, match="is padded, but the model takes no attention mask"):
        inputs_of().feeds(IDS, np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))


def test_model_without_token_ids():
    with pytest.raises(CalibrationError, match="none of them takes token ids"):
        ModelInputs((ModelInput("pixel_values", FLOAT, ("b", 3, 8, 8)),)).feeds(IDS)
