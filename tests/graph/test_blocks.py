"""A model cut into blocks and run block by block computes what it computes in one piece."""

from __future__ import annotations

import itertools
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from graph_tools import model_from_text, run

from fptq_onnx.graph.blocks import Block, find_blocks
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model, save_model


def _run_block(model: ir.Model, block: Block, known: dict[str, np.ndarray], tmp_path: Path) -> dict[str, np.ndarray]:
    """Run the part of the model between a block's inputs and outputs alone."""
    inputs = [*block.inputs, *(value for value in model.graph.inputs if value not in block.inputs)]
    part = ir.convenience.extract(model.graph, inputs, block.outputs)
    cut = ir.Model(part, ir_version=model.ir_version)
    save_model(cut, tmp_path / "block.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx", options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    results = session.run(None, {name: known[name] for name in names})
    return dict(zip([item.name for item in session.get_outputs()], results, strict=True))


def test_blocks_one_after_another_equal_the_whole(tiny_model: families.TinyModel, tmp_path: Path) -> None:
    model = load_model(tiny_model.path)
    blocks = find_blocks(model, find_linears(model))
    assert [block.index for block in blocks] == list(range(tiny_model.blocks))
    feeds = tiny_model.feeds(tiny_model.token_ids(length=6))
    crossing = [value for block in blocks for value in (*block.inputs, *block.outputs)]
    whole = run(model, feeds, tmp_path, crossing)
    known = feeds | {value.name: whole[value.name] for value in blocks[0].inputs}
    for block in blocks:
        known |= _run_block(model, block, known, tmp_path)
        for output in block.outputs:
            wanted = whole[output.name]
            # On CPU the runtime keeps float32 between neighbouring float16 operators, so a cut rounds once more.
            tolerance = 5e-3 * np.abs(wanted).max() if tiny_model.dtype == "float16" else 0
            np.testing.assert_allclose(known[output.name], wanted, rtol=0, atol=tolerance, err_msg=output.name)


def test_blocks_hold_their_layers_and_meet_at_the_residual_stream(tiny_model: families.TinyModel) -> None:
    model = load_model(tiny_model.path)
    linears = find_linears(model)
    blocks = find_blocks(model, linears)
    for block in blocks:
        assert {layer.block for layer in block.layers} == {block.index}
        # plain exports cross at one value, fused skip norms at the stream and its normed form
        assert len(block.inputs) == (2 if tiny_model.family.startswith("genai") and block.index else 1)
    inside = [layer for block in blocks for layer in block.layers]
    assert inside == [layer for layer in linears.layers if layer.block is not None]
    for before, after in itertools.pairwise(blocks):
        assert set(after.inputs) <= set(before.outputs)
        assert not set(before.nodes) & set(after.nodes)


def test_value_that_crosses_several_blocks_is_an_input_of_each(tmp_path: Path) -> None:
    """Both blocks read a projection of the embedding beside the residual stream."""
    attend = """
        k{0} = Transpose <perm = [0, 2, 1]> (h{0})
        q{0} = MatMul(h{0}, w)
        s{0} = MatMul(q{0}, k{0})
        p{0} = Softmax(s{0})
        a{0} = MatMul(p{0}, h{0})
        o{0} = MatMul(a{0}, w)
        g{0} = Mul(o{0}, side)
        h{1} = Add(h{0}, g{0})"""
    body = f"h0 = Relu(x)\n side = Tanh(x)\n {attend.format(0, 1)} {attend.format(1, 2)}\n y = Identity(h2)"
    weights = {"w": np.eye(8, dtype=np.float32)}
    model = model_from_text(tmp_path, "(float[1, 3, 8] x) => (float[1, 3, 8] y)", body, weights)
    blocks = find_blocks(model, find_linears(model))
    assert len(blocks) == 2
    assert {value.name for value in blocks[1].inputs} >= {"h1", "side"}
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)}
    whole = run(model, feeds, tmp_path, [*blocks[1].inputs, *blocks[1].outputs])
    known = feeds | {value.name: whole[value.name] for value in blocks[1].inputs}
    result = _run_block(model, blocks[1], known, tmp_path)
    for name, array in result.items():
        np.testing.assert_array_equal(array, whole[name])


@pytest.mark.parametrize("body", ["y = Relu(x)", "h = MatMul(x, w)\n y = Add(h, x)"])
def test_graph_without_attention_has_no_blocks(tmp_path: Path, body: str) -> None:
    weights = {"w": np.eye(8, dtype=np.float32)} if "w" in body else {}
    model = model_from_text(tmp_path, "(float[1, 3, 8] x) => (float[1, 3, 8] y)", body, weights)
    assert find_blocks(model, find_linears(model)) == []
