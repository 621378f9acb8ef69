"""Float32 attention of onnxruntime-genai's graphs goes to this package's op; every other form of it stays."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest
from conversions import relative_error, values

import fptq_onnx
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.generate import generate
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.lookups import position_limit
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.passes.add_functions import AddFunctionsPass
from fptq_onnx.passes.fuse_attention import FuseAttentionPass

OURS, RUNTIME = "PackedRotaryGroupQueryAttention", "GroupQueryAttention"


def _source() -> Path:
    return families.model("llama", families.GENAI_FP32).path


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder, saved with our attention."""
    model = load_model(_source())
    assert FuseAttentionPass()(model).modified
    AddFunctionsPass()(model)
    assert not FuseAttentionPass()(model).modified
    path = tmp_path_factory.mktemp("attention") / "model.onnx"
    save_model(model, path)
    return path


def test_every_node_is_replaced_and_the_model_stays_what_it_was(fused: Path) -> None:
    one, other = load_model(fused), load_model(_source())
    assert _operators(one) == _operators(other) - Counter({RUNTIME: families.BLOCKS}) + Counter({OURS: families.BLOCKS})
    assert [value.name for value in one.graph.outputs] == [value.name for value in other.graph.outputs]
    tiny = families.model("llama", families.GENAI_FP32)
    feeds = tiny.feeds(tiny.token_ids())
    names = [str(value.name) for value in other.graph.outputs]
    wanted = values(other, names, feeds)
    for name, array in values(one, names, feeds).items():
        assert relative_error(array, wanted[name]) < 1e-5
    body = fptq_onnx.session(fused, register_library=False, threads=1)
    for name, array in zip(names, body.run(names, feeds), strict=True):
        assert relative_error(array, wanted[name]) < 1e-5


def test_the_graph_is_read_as_before(fused: Path) -> None:
    """The attention node tells roles of layers, whether the cache grows in place, its head size, the longest text."""
    models = [load_model(path) for path in (fused, _source())]
    one, other = (describe_inputs(model) for model in models)
    assert one == other and one.in_place
    limits = [position_limit(model.graph, model.graph.inputs[0]) for model in models]
    assert limits[0] == limits[1] is not None
    layers = [[(layer.label, layer.role) for layer in find_linears(model).layers] for model in models]
    assert layers[0] == layers[1]


def test_it_generates_the_same_tokens(fused: Path) -> None:
    prompts = [[5, 6, 7, 8, 9], [200], [31, 14, 15]]
    one, other = (
        generate(open_language_model(path, threads=2), prompts, max_new_tokens=12).token_ids
        for path in (fused, _source())
    )
    assert one == other


def test_float16_keeps_the_kernel_it_has_on_cuda(caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(families.model("llama", families.GENAI_FP16).path)
    with caplog.at_level(logging.INFO):
        assert not FuseAttentionPass()(model).modified
    assert (
        caplog.text.count("stays onnxruntime's GroupQueryAttention: its type is FLOAT16, not FLOAT") == families.BLOCKS
    )


def _set(name: str, value: float | str) -> ir.Attr:
    make = {int: ir.AttrInt64, float: ir.AttrFloat32, str: ir.AttrString}[type(value)]
    return make(name, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("softcap", 5.0), "its softcap is 5.0"),
        (_set("local_window_size", 16), "its local_window_size is 16"),
        (_set("smooth_softmax", 1), "its smooth_softmax is 1"),
        (_set("k_quant_type", "PER_TENSOR"), "its k_quant_type is PER_TENSOR"),
        (_set("something_new", 1), "its something_new is 1"),
        ({10: "sin_cache"}, "it has position ids, an attention bias, sinks or scales"),
        ({7: None}, "it rotates without tables"),
        ({3: None}, "it has no cache of keys and values"),
        ({2: "sin_cache"}, "it has a key without a value, or a value without a key"),
    ],
    ids=str,
)
def test_what_stays(change: ir.Attr | dict[int, str | None], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(_source())
    node = next(node for node in model.graph if node.op_type == RUNTIME)
    if isinstance(change, ir.Attr):
        node.attributes.add(change)
    else:
        for index, name in change.items():
            node.replace_input_with(index, None if name is None else model.graph.initializers[name])
    with caplog.at_level(logging.INFO):
        FuseAttentionPass()(model)
    assert _operators(model)[RUNTIME] == 1 and f"{node.name}: stays onnxruntime's {RUNTIME}: {reason}" in caplog.text


def test_plain_options_by_name_are_no_obstacle() -> None:
    model = load_model(_source())
    for node in model.graph:
        if node.op_type == RUNTIME:
            for name, value in (("smooth_softmax", 0), ("qk_output", 0), ("k_quant_type", "NONE")):
                node.attributes.add(_set(name, value))
    FuseAttentionPass()(model)
    assert _operators(model)[OURS] == families.BLOCKS and not _operators(model)[RUNTIME]


def test_separate_operands_and_no_rotation() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
main (float[B, S, 64] q, float[B, S, 32] k, float[B, S, 32] v, float[B, 2, P, 16] pk, float[B, 2, P, 16] pv,
      int32[B] last, int32[1] total) => (float[B, S, 64] y, float[B, 2, T, 16] key, float[B, 2, T, 16] value)
{
  y, key, value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, pk, pv, last, total)
}"""
    model, separate = ir.from_onnx_text(text), ir.from_onnx_text(text)
    FuseAttentionPass()(model)
    assert _operators(model) == {RUNTIME: 1} and next(iter(model.graph)).domain == "fptq"
    AddFunctionsPass()(model)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 1, 64), "k": (2, 1, 32), "v": (2, 1, 32), "pk": (2, 2, 7, 16), "pv": (2, 2, 7, 16)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds |= {"last": np.array([7, 7], np.int32), "total": np.array([8], np.int32)}
    for name in ("y", "key", "value"):
        one, other = (values(m, [name], feeds)[name] for m in (model, separate))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_convert_fuses_on_request(tmp_path: Path) -> None:
    for fuse in (True, False):
        path = tmp_path / f"{fuse}.onnx"
        fptq_onnx.convert(_source(), path, recipe="balanced", fuse=fuse, verify_tokens=0)
        assert _operators(load_model(path))[OURS] == (families.BLOCKS if fuse else 0)
