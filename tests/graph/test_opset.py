"""Conversion to opset 21 keeps what a model computes, or says clearly that it cannot."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from graph_tools import run

from fptq_onnx.errors import ModelError
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.opset import MINIMUM_IR_VERSION, MINIMUM_OPSET, ensure_opset

X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)


def _model(tmp_path: Path, nodes: list[onnx.NodeProto], opset: int, ir_version: int = 8, domain: str = "") -> ir.Model:
    x = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 6, 8])
    y = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    weights = [onnx.numpy_helper.from_array(np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32), "w")]
    graph = oh.make_graph(nodes, "g", [x], [y], weights)
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid(domain, opset)], ir_version=ir_version)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return load_model(path)


# An op of each kind of change on the way: axes moved to an input (13, 18), attributes renamed, types added.
NODES = {
    17: [
        oh.make_node("ReduceMean", ["x"], ["m"], axes=[-1], keepdims=1),
        oh.make_node("Sub", ["x", "m"], ["c"]),
        oh.make_node("Split", ["c"], ["c1", "c2"], axis=1),
        oh.make_node("Add", ["c1", "c2"], ["s"]),
        oh.make_node("MatMul", ["s", "w"], ["h"]),
        oh.make_node("Softmax", ["h"], ["y"], axis=-1),
    ],
    11: [
        oh.make_node("Unsqueeze", ["x"], ["u"], axes=[0]),
        oh.make_node("Squeeze", ["u"], ["v"], axes=[0]),
        oh.make_node("ReduceSum", ["v"], ["m"], axes=[1], keepdims=1),
        oh.make_node("MatMul", ["m", "w"], ["h"]),
        oh.make_node("Softmax", ["h"], ["y"], axis=2),
    ],
    18: [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Identity", ["h"], ["y"])],
    20: [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Gelu", ["h"], ["y"])],
}


@pytest.mark.parametrize("opset", sorted(NODES))
def test_conversion_keeps_results(tmp_path: Path, opset: int) -> None:
    before = run(_model(tmp_path, NODES[opset], opset), {"x": X}, tmp_path)["y"]
    model = _model(tmp_path, NODES[opset], opset)
    assert ensure_opset(model) == opset
    assert model.opset_imports[""] == MINIMUM_OPSET
    assert model.ir_version == MINIMUM_IR_VERSION
    assert "w" in model.graph.initializers
    np.testing.assert_allclose(run(model, {"x": X}, tmp_path)["y"], before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", [families.DYNAMO, families.DYNAMO_KV])
@pytest.mark.parametrize("opset", [18, 20])
def test_exported_graphs_of_earlier_opsets(tmp_path: Path, family: str, opset: int) -> None:
    """The families are exported at opset 21 or later; none of their ops changed, so the number alone made them so."""
    tiny = families.model("llama", family)
    model = load_model(tiny.path)
    feeds = tiny.feeds(tiny.token_ids(length=5))
    before = run(model, feeds, tmp_path)["logits"]
    model.graph.opset_imports[""] = opset
    names = list(model.graph.initializers)
    assert ensure_opset(model) == opset
    assert list(model.graph.initializers) == names
    np.testing.assert_array_equal(run(model, feeds, tmp_path)["logits"], before)


def test_later_opsets_are_left_alone(tmp_path: Path) -> None:
    for opset in (21, 22, 23):
        model = _model(tmp_path, NODES[20], opset, ir_version=10)
        nodes = list(model.graph)
        assert ensure_opset(model) == opset
        assert model.opset_imports[""] == opset
        assert list(model.graph) == nodes


def test_genai_graph_is_left_alone() -> None:
    model = load_model(families.model("llama", families.GENAI_FP32).path)
    before, nodes = dict(model.opset_imports), list(model.graph)
    ensure_opset(model)
    assert (dict(model.opset_imports), list(model.graph)) == (before, nodes)


def test_ir_version_is_raised(tmp_path: Path) -> None:
    model = _model(tmp_path, NODES[20], 21, ir_version=9)
    ensure_opset(model)
    assert model.ir_version == MINIMUM_IR_VERSION


def test_unknown_operator_cannot_be_converted(tmp_path: Path) -> None:
    nodes = [oh.make_node("NoSuchOperator", ["x", "w"], ["y"], name="odd")]
    with pytest.raises(ModelError, match="node odd: NoSuchOperator is no operator in opset 18"):
        ensure_opset(_model(tmp_path, nodes, 18))
    with pytest.raises(ModelError, match="node odd: NoSuchOperator is no operator in opset 14"):
        ensure_opset(_model(tmp_path, nodes, 14))


def test_attribute_that_no_longer_exists_is_refused(tmp_path: Path) -> None:
    """A file that says 18 but holds ReduceMean as of opset 13."""
    nodes = [oh.make_node("ReduceMean", ["x"], ["y"], name="mean", axes=[-1])]
    with pytest.raises(ModelError, match="node mean: ReduceMean has no attribute axes in opset 18"):
        ensure_opset(_model(tmp_path, nodes, 18))


def test_operators_of_the_runtime_are_kept(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["h"]),
        oh.make_node("Constant", [], ["g"], value_floats=[1.0, 2.0, 3.0, 4.0]),
        oh.make_node("SimplifiedLayerNormalization", ["h", "g"], ["y"]),
    ]
    before = run(_model(tmp_path, nodes, 18), {"x": X}, tmp_path)["y"]
    model = _model(tmp_path, nodes, 18)
    ensure_opset(model)
    np.testing.assert_array_equal(run(model, {"x": X}, tmp_path)["y"], before)


def test_redefined_operator_whose_shapes_are_unknown_is_refused(tmp_path: Path) -> None:
    """GroupNormalization-21 has scales per channel, not per group: the new number alone would change the result."""
    nodes = [
        oh.make_node("Identity", ["x"], ["i"]),
        oh.make_node("GroupNormalization", ["i", "s", "s"], ["y"], num_groups=2, name="gn"),
    ]
    model = _model(tmp_path, [oh.make_node("Constant", [], ["s"], value_floats=[1.0, 2.0]), *nodes], 18)
    for node in model.graph:
        node.outputs[0].shape = None
    with pytest.raises(ModelError, match="GroupNormalization"):
        ensure_opset(model)


def test_model_without_onnx_opset(tmp_path: Path) -> None:
    model = _model(tmp_path, NODES[20], 1, domain="custom")
    with pytest.raises(ModelError, match="operator set"):
        ensure_opset(model)
