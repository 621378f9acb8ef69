"""Quantized embedding tables: the values they give, and one table for embedding and head where they are tied."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest
from conversions import constants, converted, relative_error, values
from other_runtimes import python_with
from pass_models import parse

from fptq_onnx.errors import ModelError
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.lookups import token_lookups
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.passes.quantize_embedding import QuantizeEmbeddingPass, find_tied_heads
from fptq_onnx.passes.replace_linears import LayerQuantization, StaticQuantizer
from fptq_onnx.quantization.int4 import QuantizedWeight, quantize_weight
from fptq_onnx.rewriting import Format, rewrite

V, H = 20, 6
INT8 = {"layers__lm_head": "int8", "layers__embedding": "int8"}
INT4 = {"layers__lm_head": "int4", "layers__embedding": "int4", "weights__grid": "signed8"}
IDS = np.array([[0, 19, 3], [7, 7, 1]])


def _lookup(tmp_path: Path, table: np.ndarray, element: str) -> ir.Model:
    signature = f"(int64[B, S] input_ids) => ({element}[B, S, {table.shape[1]}] Y)"
    return parse(tmp_path, signature, "E = Gather(table, input_ids)\nY = Neg(E)", {"table": table})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_within_half_a_step(tmp_path: Path, dtype: str) -> None:
    table = np.random.default_rng(0).standard_normal((V, H)).astype(dtype)
    table[3] = 0
    model = _lookup(tmp_path, table, "float" if dtype == "float32" else dtype)
    embedding = QuantizeEmbeddingPass()
    embedding(model)
    assert embedding.outcome == "int8"
    found = values(model, ["Y"], {"input_ids": IDS})["Y"]
    assert found.dtype == dtype and found.shape == (2, 3, H)
    step = np.abs(table.astype(np.float32)).max(axis=1) / 127
    assert (np.abs(found + table[IDS]).max(axis=-1) <= step[IDS] * 0.51 + 1e-3 * (dtype == "float16")).all()
    assert describe_inputs(model).vocabulary == V


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("width", "group", "standard", "block"),
    [
        (64, 32, False, 32),
        (96, 128, False, 32),  # the largest block that divides the width
        (64, "channel", False, 64),
        (64, 32, True, 32),
        (72, 32, False, 32),  # no such block: columns, the last group is short
        (6, 128, False, 6),
    ],
)
def test_int4_rows_are_those_of_the_quantized_table(
    tmp_path: Path, width: int, group: int, standard: bool, block: int, dtype: str
) -> None:
    """Bit for bit, a row of zeros (padding_idx) included."""
    table = np.random.default_rng(0).standard_normal((V, width)).astype(dtype)
    table[3] = 0
    model = _lookup(tmp_path, table, "float" if dtype == "float32" else dtype)
    embedding = QuantizeEmbeddingPass("int4", group_size=group, standard=standard)
    embedding(model)
    assert embedding.outcome == "int4"
    rows = "GatherBlockQuantized" in {node.op_type for node in model.graph}
    assert rows == (not standard and width % 16 == 0)
    found = values(model, ["Y"], {"input_ids": IDS})["Y"]
    wanted = quantize_weight(np.ascontiguousarray(table.T, np.float32), block, "mse_clip", dtype).dequantize().T
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, -wanted.astype(dtype)[IDS])
    assert not found[0, 2].any()
    assert describe_inputs(model).vocabulary == V
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.uses())
    scales = -(-width // block) * V * np.dtype(dtype).itemsize
    assert stored <= V * width / 2 + scales + 8 * width


def test_bfloat16_tables_are_looked_up_in_float32(tmp_path: Path) -> None:
    """onnxruntime's CPU kernel has no bfloat16."""
    table = np.random.default_rng(0).standard_normal((V, 64)).astype(np.float32)
    signature = "(int64[B, S] input_ids) => (float[B, S, 64] Y)"
    body = "<bfloat16[B, S, 64] E>\n{\nt = Cast<to = 16>(table)\nE = Gather(t, input_ids)\nY = Cast<to = 1>(E)\n}"
    model = parse(tmp_path, signature, body.partition("{\n")[2].rstrip("}\n"), {"table": table})
    lookup = next(node for node in model.graph if node.op_type == "Gather")
    lookup.outputs[0].type, lookup.outputs[0].shape = ir.TensorType(ir.DataType.BFLOAT16), ir.Shape(["B", "S", 64])
    embedding = QuantizeEmbeddingPass("int4", group_size=32)
    embedding(model)
    assert embedding.outcome == "int4"
    found = values(model, ["Y"], {"input_ids": IDS})["Y"]
    assert relative_error(found, table[IDS]) < 0.15
    np.testing.assert_array_equal(found, found.astype("bfloat16").astype(np.float32))


def test_other_tables_are_left_alone(tmp_path: Path) -> None:
    table = np.ones((V, H), np.float32)
    model = parse(tmp_path, f"(int64[B, S] kinds) => (float[B, S, {H}] Y)", "Y = Gather(t, kinds)", {"t": table})
    embedding = QuantizeEmbeddingPass()
    embedding(model)
    assert embedding.outcome.startswith("float: no token ids")
    assert [node.op_type for node in model.graph] == ["Gather"]


def test_a_table_that_callers_may_replace_is_left_alone(tmp_path: Path) -> None:
    """An initializer that is an input of the graph as well is a default, no constant."""
    signature = f"(int64[B, S] input_ids, float[{V}, {H}] table) => (float[B, S, {H}] Y)"
    model = parse(tmp_path, signature, "Y = Gather(table, input_ids)", {"table": np.ones((V, H), np.float32)})
    embedding = QuantizeEmbeddingPass("int4", heads=find_tied_heads(model))
    embedding(model)
    assert embedding.outcome.startswith("float: no token ids")


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_broken_table_is_named(tmp_path: Path, method: str) -> None:
    table = np.full((V, H), np.inf, np.float32)
    model = _lookup(tmp_path, table, "float")
    with pytest.raises(ModelError, match=r"embedding table of .* holds NaN or Inf"):
        QuantizeEmbeddingPass(method)(model)


def _tied(tmp_path: Path, width: int, scale: np.ndarray | None = None) -> tuple[ir.Model, QuantizedWeight]:
    """A table, scaled as Gemma's is, and a head of the same weights, or of others; and the head's int4 weight."""
    table = np.random.default_rng(1).standard_normal((V, width)).astype(np.float32)
    head = table.T if scale is None else scale[:, None] * table.T
    body = (
        "E = Gather(table, input_ids)\nhidden = Mul(E, factor)\nw = Transpose<perm = [1, 0]>(table)\n"
        f"Y = MatMul(hidden, {'w' if scale is None else 'other'})"
    )
    constant = {"table": table, "factor": np.array(8, np.float32)}
    signature = f"(int64[B, S] input_ids) => (float[B, S, {V}] Y, float[B, S, {width}] hidden)"
    constant |= {} if scale is None else {"other": np.ascontiguousarray(head)}
    return parse(tmp_path, signature, body, constant), quantize_weight(head, 32, "signed8", np.float32)


def _rewritten(model: ir.Model, weight: QuantizedWeight | None, output_format: Format) -> str:
    (layer,) = find_linears(model).layers
    activation = StaticQuantizer(0.2, 128)
    decided = LayerQuantization(activation, None if weight is None else partial(lambda weight: weight, weight))
    return rewrite(model, {layer.name: decided}, output_format, embedding="int4", group_size=32)


@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("output_format", ["custom", "qdq", "matmulnbits"])
def test_head_and_embedding_read_one_initializer(tmp_path: Path, output_format: Format, width: int) -> None:
    model, weight = _tied(tmp_path, width)
    outcome = _rewritten(model, weight, output_format)
    padded = output_format == "matmulnbits" and width == 72
    assert outcome == (
        "int4, a table of its own: lm_head fills up 72 channels to 96" if padded else "int4, one table with the head"
    )
    arrays = constants(model)
    tables = [name for name, array in arrays.items() if array.size >= V * width // 2]
    assert len(tables) == 1 + padded
    if not padded:
        (integers,) = (model.graph.initializers[name] for name in tables)
        assert len(integers.uses()) == 2
        found = values(model, ["hidden"], {"input_ids": IDS})["hidden"]
        np.testing.assert_array_equal(found, 8 * weight.dequantize().T[IDS])
    assert describe_inputs(model).vocabulary == V


@pytest.mark.parametrize("output_format", ["custom", "matmulnbits"])
def test_other_weights_are_not_tied(tmp_path: Path, output_format: Format) -> None:
    """A head with an equalization scale folded in keeps its own integers."""
    model, weight = _tied(tmp_path, 64, np.linspace(0.5, 2, 64, dtype=np.float32))
    assert (
        _rewritten(model, weight, output_format)
        == "int4, a table of its own: lm_head has other weights (untied, or equalized)"
    )
    table = constants(model)
    assert sum(array.size >= V * 32 for array in table.values()) == 2


def test_equal_copies_of_the_weights_are_tied(tmp_path: Path) -> None:
    """Older exporters store the head's weight once more, transposed."""
    model, weight = _tied(tmp_path, 64, np.ones(64, np.float32))
    assert _rewritten(model, weight, "custom") == "int4, one table with the head"
    assert sum(array.size >= V * 32 for array in constants(model).values()) == 1


def test_a_float_head_is_not_shared(tmp_path: Path) -> None:
    model, _ = _tied(tmp_path, 64)
    assert _rewritten(model, None, "custom") == "int4, a table of its own: lm_head is float"


FAMILIES = [families.DYNAMO, families.GENAI_FP32, families.GENAI_FP16]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("output_format", ["custom", "qdq"])
@pytest.mark.parametrize(("method", "share"), [("int8", 0.6), ("int4", 0.35)])
def test_tied_weights_are_stored_once(family: str, output_format: Format, method: str, share: float) -> None:
    changes = INT8 if method == "int8" else INT4
    plain, small = (converted("llama", family, output_format, **changed) for changed in ({}, changes))
    assert small.report.embedding == f"{method}, one table with the head"
    model = load_model(small.path)
    vocabulary = describe_inputs(load_model(small.tiny.path)).vocabulary
    tables = [array for array in constants(model).values() if vocabulary in array.shape and array.ndim == 2]
    assert sorted(array.shape[0] for array in tables) == ([72] if method == "int8" else [3, 72])
    (head,) = (layer for layer in small.report.layers if layer.role == "lm_head")
    assert 0 < head.bytes_after < share * head.bytes_before
    assert small.report.bytes_after < plain.report.bytes_after - (1 - share) * head.bytes_before
    assert small.report.verification is not None and plain.report.verification is not None
    assert small.report.verification.kl_mean < (1.5 if method == "int8" else 4) * plain.report.verification.kl_mean
    assert describe_inputs(model).vocabulary == vocabulary
    assert not token_lookups(model.graph)  # nothing left to quantize


@pytest.mark.parametrize("changes", [INT8, INT4], ids=["int8", "int4"])
def test_the_library_and_the_function_bodies_agree(changes: dict[str, str]) -> None:
    small = converted("llama", families.DYNAMO, **changes)
    token_ids = small.tiny.token_ids()
    assert relative_error(small.run(token_ids, library=False), small.run(token_ids)) < 1e-4


def test_tied_weights_stay_tied_under_a_rotation() -> None:
    turned = converted("llama", families.GENAI_FP32, rotation__residual=True, **INT4)
    assert turned.report.rotation["residual"] == "applied"
    assert turned.report.embedding == "int4, one table with the head"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activations__scheme": "equalized-static", **INT4}, "lm_head has other weights (untied, or equalized)"),
        ({**INT4, "layers__lm_head": "int8"}, "lm_head is int8"),
        ({**INT8, "layers__lm_head": "int4"}, "lm_head is int4"),
    ],
    ids=["equalized", "int8-head", "int4-head"],
)
def test_tables_that_cannot_be_shared_say_why(changes: dict[str, str], reason: str) -> None:
    apart = converted("llama", families.DYNAMO, **changes)
    assert apart.report.embedding == f"{changes['layers__embedding']}, a table of its own: {reason}"


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP16])
def test_untied_tables_have_their_own_integers(family: str) -> None:
    apart = converted("llama-untied", family, rotation__residual=True, **INT4)
    assert apart.report.embedding == "int4, a table of its own: lm_head has other weights (untied, or equalized)"
    assert apart.report.bytes_after < 0.4 * apart.report.bytes_before


_HIDDEN = """
import sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
for model in sys.argv[2:]:
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    ids = np.load(sys.argv[1])
    np.save(model + ".npy", session.run(["hidden"], {"input_ids": ids})[0])
"""


def test_the_oldest_onnxruntime_gives_the_same_rows(tmp_path: Path) -> None:
    """Standard operators for a table in the head's layout, GatherBlockQuantized for MatMulNBits' and for others."""
    wanted, paths = {}, []
    for output_format, own in (("custom", False), ("matmulnbits", False), ("custom", True)):
        model, weight = _tied(tmp_path, 64, np.linspace(0.5, 2, 64, dtype=np.float32) if own else None)
        _rewritten(model, weight, output_format)
        paths.append(tmp_path / f"{output_format}-{own}.onnx")
        save_model(model, paths[-1])
        wanted[paths[-1]] = values(model, ["hidden"], {"input_ids": IDS})["hidden"]
    np.save(tmp_path / "ids.npy", IDS)
    subprocess.run([python_with("1.23.2"), "-c", _HIDDEN, tmp_path / "ids.npy", *paths], check=True)
    for path, rows in wanted.items():
        np.testing.assert_array_equal(np.load(f"{path}.npy"), rows)
