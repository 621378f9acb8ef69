"""The int8 embedding table: the values it gives, and one table for embedding and head where they are tied."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
from conversions import constants, converted, relative_error, values
from pass_models import parse

from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.passes.quantize_embedding import QuantizeEmbeddingPass

V, H = 20, 6
HEAD = {"layers__lm_head": "int8", "layers__embedding": "int8"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_within_half_a_step(tmp_path: Path, dtype: str) -> None:
    table = np.random.default_rng(0).standard_normal((V, H)).astype(dtype)
    table[3] = 0
    name = "float" if dtype == "float32" else dtype
    signature = f"(int64[B, S] input_ids) => ({name}[B, S, {H}] Y)"
    model = parse(tmp_path, signature, "E = Gather(table, input_ids)\nY = Neg(E)", {"table": table})
    embedding = QuantizeEmbeddingPass()
    embedding(model)
    assert embedding.outcome == "int8"
    ids = np.array([[0, 19, 3], [7, 7, 1]])
    found = values(model, ["Y"], {"input_ids": ids})["Y"]
    assert found.dtype == dtype and found.shape == (2, 3, H)
    step = np.abs(table.astype(np.float32)).max(axis=1) / 127
    assert (np.abs(found + table[ids]).max(axis=-1) <= step[ids] * 0.51 + 1e-3 * (dtype == "float16")).all()
    assert describe_inputs(model).vocabulary == V


def test_other_tables_are_left_alone(tmp_path: Path) -> None:
    table = np.ones((V, H), np.float32)
    model = parse(tmp_path, f"(int64[B, S] kinds) => (float[B, S, {H}] Y)", "Y = Gather(t, kinds)", {"t": table})
    embedding = QuantizeEmbeddingPass()
    embedding(model)
    assert embedding.outcome.startswith("float: no token ids")
    assert [node.op_type for node in model.graph] == ["Gather"]


@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32, families.GENAI_FP16])
@pytest.mark.parametrize("output_format", ["custom", "qdq"])
def test_tied_weights_are_stored_once(family: str, output_format: str) -> None:
    plain, small = (converted("llama", family, output_format, **changes) for changes in ({}, HEAD))
    assert small.report.embedding == "int8, one table with the head"
    model = load_model(small.path)
    vocabulary = describe_inputs(load_model(small.tiny.path)).vocabulary
    tables = [name for name, array in constants(model).items() if vocabulary in array.shape and array.ndim == 2]
    assert len(tables) == 1
    (head,) = (layer for layer in small.report.layers if layer.role == "lm_head")
    assert head.weight_method == "int8" and 0 < head.bytes_after < 0.6 * head.bytes_before
    assert small.report.verification is not None and plain.report.verification is not None
    assert small.report.verification.kl_mean < 1.5 * plain.report.verification.kl_mean
    assert describe_inputs(model).vocabulary == vocabulary


def test_the_library_and_the_function_bodies_agree() -> None:
    small = converted("llama", families.DYNAMO, **HEAD)
    token_ids = small.tiny.token_ids()
    assert relative_error(small.run(token_ids, library=False), small.run(token_ids)) < 1e-4
