"""Graphs that are no network: cycles, missing values, nodes that break their operator's rules, bombs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import base_model
import numpy as np
import onnx
from case import Attempt, case
from onnx import helper, numpy_helper

from fptq_onnx.errors import CalibrationError, NothingQuantizedError

_GRAPH = "Graph"
_NODE = "Nodes"


def _model(
    folder: Path,
    nodes: Sequence[onnx.NodeProto] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    opsets: dict[str, int] | None = None,
) -> Attempt:
    proto = base_model.model(base_model.weights() | (extra or {}), nodes, opsets=opsets)
    return Attempt(base_model.save(proto, folder / "model.onnx"))


def _with(index: int, **fields: Any) -> list[onnx.NodeProto]:
    """The base model's nodes, node `index` changed: `input` or `output` replaced, anything else an attribute."""
    nodes = base_model.nodes()
    node = nodes[index]
    for name in ("input", "output"):
        if name in fields:
            getattr(node, name)[:] = fields.pop(name)
    node.op_type = fields.pop("op_type", node.op_type)
    node.domain = fields.pop("domain", node.domain)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in fields.items())
    return nodes


def _through(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The base model with nodes between initializer "up" and the MatMul, which reads their last output."""
    last = nodes[-1].output[0]
    return [*nodes, *base_model.nodes(up=last)]


# ---- graph -----------------------------------------------------------------------------------------------------------


@case(_GRAPH, "a cycle", "the graph has a cycle")
def cycle(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["h", "up"]))


@case(_GRAPH, "a node that reads its own output", "the graph has a cycle")
def self_loop(folder: Path) -> Attempt:
    return _model(folder, _with(2, input=["t"]))


@case(_GRAPH, "a missing initializer", "node up_proj: nothing computes its input ghost")
def missing_initializer(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["x", "ghost"]))


@case(_GRAPH, "a graph output that nothing computes", "nothing computes the graph output logits")
def missing_output(folder: Path) -> Attempt:
    return _model(folder, _with(5, output=["other"]))


@case(_GRAPH, "two nodes that write one value", "value u is written twice")
def written_twice(folder: Path) -> Attempt:
    return _model(folder, _with(2, output=["u"]))


@case(_GRAPH, "a node that writes over a graph input", "value input_ids is written twice")
def input_written(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    nodes.append(helper.make_node("Identity", ["input_ids"], ["input_ids"], name="writer"))
    return _model(folder, nodes)


@case(_GRAPH, "a node that writes over an initializer", "value up is written twice")
def initializer_written(folder: Path) -> Attempt:
    return _model(folder, _with(0, output=["up"]))


@case(_GRAPH, "two initializers of one name", "value up is written twice")
def initializer_twice(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((32, 48), np.float32), "up"))
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_GRAPH, "a name that is not UTF-8", "is not UTF-8 text")
def name_not_utf8(folder: Path) -> Attempt:
    path = folder / "model.onnx"
    path.write_bytes(base_model.model().SerializeToString().replace(b"activation", b"activ\xff\xfeion"))
    return Attempt(path)


@case(_GRAPH, "an operator whose name is not UTF-8", "is not UTF-8 text")
def operator_not_utf8(folder: Path) -> Attempt:
    path = folder / "model.onnx"
    path.write_bytes(base_model.model().SerializeToString().replace(b"Tanh", b"Ta\xff\xfe"))
    return Attempt(path)


@case(_GRAPH, "an initializer without a name", "an initializer has no name")
def nameless_initializer(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((32, 48), np.float32), ""))
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_GRAPH, "a graph without nodes", "nothing computes the graph output logits")
def no_nodes(folder: Path) -> Attempt:
    return _model(folder, [])


@case(_GRAPH, "a graph without outputs", "the graph has no output")
def no_outputs(folder: Path) -> Attempt:
    proto = base_model.model()
    del proto.graph.output[:]
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(
    _GRAPH,
    "no MatMul with a constant weight",
    "it has no linear layer with a constant weight",
    error=NothingQuantizedError,
)
def nothing_to_quantize(folder: Path) -> Attempt:
    nodes = [base_model.nodes()[0], helper.make_node("Identity", ["x"], ["logits"], name="out")]
    return _model(folder, nodes)


@case(_GRAPH, "a weight of shape [0, N] for an activation of 32 channels", "Node (up_proj) Op (MatMul)")
def zero_k(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["x", "empty"]), {"empty": np.zeros((0, 48), np.float32)})


@case(_GRAPH, "a function that calls itself", "function loop.f calls itself")
def recursive_function(folder: Path) -> Attempt:
    proto = base_model.model(None, _with(2, domain="loop", op_type="f"), opsets={"": 21, "loop": 1})
    body = [helper.make_node("f", ["a"], ["b"], domain="loop", name="again")]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("loop", 1)]
    proto.functions.append(helper.make_function("loop", "f", ["a"], ["b"], body, imports))
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_GRAPH, "40 functions, each calling the one below twice", "its functions expand to 1.1e+12 nodes")
def function_bomb(folder: Path) -> Attempt:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("bomb", 1)]
    proto = base_model.model(None, _with(2, domain="bomb", op_type="f39"), opsets={"": 21, "bomb": 1})
    for level in range(40):
        inner = ("Tanh", "") if level == 0 else (f"f{level - 1}", "bomb")
        body = [
            helper.make_node(inner[0], ["a"], ["m"], domain=inner[1], name="first"),
            helper.make_node(inner[0], ["m"], ["b"], domain=inner[1], name="second"),
        ]
        proto.functions.append(helper.make_function("bomb", f"f{level}", ["a"], ["b"], body, imports))
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(
    _GRAPH, "an initializer that asks for 256 TB and holds nothing", "tensor big: holds 0 bytes where its shape needs"
)
def empty_giant(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.graph.initializer.append(onnx.TensorProto(name="big", dims=[2**23, 2**23], data_type=1, raw_data=b""))
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_GRAPH, "a computed tensor of 4 EB", "Name:'expand'", error=CalibrationError)
def expanded_giant(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    nodes.insert(1, helper.make_node("Expand", ["x", "giant"], ["xx"], name="expand"))
    nodes.insert(2, helper.make_node("ReduceMax", ["xx"], ["xm"], keepdims=1, name="reduce"))
    nodes[3].input[:] = ["x", "up"]
    nodes[-2].input[:] = ["xm", "d"]
    return _model(folder, nodes, {"giant": np.array([2**20, 2**20, 2**20, 1], np.int64)})


@case(_GRAPH, "5000 nodes in a row", None)
def long_chain(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    chain = [helper.make_node("Neg", [f"c{i}" if i else "h"], [f"c{i + 1}"], name=f"neg{i}") for i in range(5000)]
    nodes[-1].input[0] = "c5000"
    return _model(folder, [*nodes[:-1], *chain, nodes[-1]])


@case(_GRAPH, "2000 residual sums in a row", None)
def long_residual(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    chain = [helper.make_node("Add", [f"c{i}" if i else "h", "x"], [f"c{i + 1}"], name=f"add{i}") for i in range(2000)]
    scale = helper.make_node("Mul", ["c2000", "small"], ["hh"], name="mul")
    nodes[-1].input[0] = "hh"
    return _model(folder, [*nodes[:-1], *chain, scale, nodes[-1]], {"small": np.float32(1e-3)})


@case(_GRAPH, "DequantizeLinear nodes on each other, 40 deep, both operands of each the one before", None)
def dequantize_bomb(folder: Path) -> Attempt:
    tower = []
    for i in range(40):
        tower += [
            helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}"], [f"s{i + 1}"], name=f"dq{i}"),
            helper.make_node("Cast", [f"s{i + 1}"], [f"q{i + 1}"], to=onnx.TensorProto.INT8, name=f"cast{i}"),
        ]
    last = helper.make_node("DequantizeLinear", ["weight", "s40"], ["w"], name="last")
    extra = {"q0": np.array(1, np.int8), "s0": np.float32(1), "weight": np.ones((32, 48), np.int8)}
    return _model(folder, [*tower, *_through(last)], extra)


@case(_GRAPH, "a shape that is Concat of itself, 12 deep and 10 wide", "it concatenates 100000 parts")
def concat_bomb(folder: Path) -> Attempt:
    tower = [helper.make_node("Concat", [f"s{i}"] * 10, [f"s{i + 1}"], axis=0, name=f"concat{i}") for i in range(12)]
    shape = [helper.make_node("Shape", ["x"], ["s0"], name="shape"), *tower]
    cut = helper.make_node("Reshape", ["x", "s12"], ["never"], name="never")
    then = helper.make_graph([*shape, cut], "never", [], [base_model.value_info("never", None)])
    keep = helper.make_node("Identity", ["h"], ["same"], name="keep")
    other = helper.make_graph([keep], "same", [], [base_model.value_info("same", None)])
    choose = helper.make_node("If", ["no"], ["chosen"], then_branch=then, else_branch=other, name="choose")
    nodes = base_model.nodes()
    nodes[-1].input[0] = "chosen"
    return _model(folder, [*nodes[:-1], choose, nodes[-1]], {"no": np.array(False)})


# ---- nodes -----------------------------------------------------------------------------------------------------------


@case(_NODE, "an operator that does not exist", "node activation: Tanhh is no operator")
def unknown_operator(folder: Path) -> Attempt:
    return _model(folder, _with(2, op_type="Tanhh"))


@case(_NODE, "an operator of a domain that nobody registered", "com.example")
def unknown_domain(folder: Path) -> Attempt:
    return _model(folder, _with(2, domain="com.example"), opsets={"": 21, "com.example": 1})


@case(_NODE, "no operator type", "node activation")
def no_operator(folder: Path) -> Attempt:
    return _model(folder, _with(2, op_type=""))


@case(_NODE, "MatMul of one input", "node up_proj: MatMul with 1 input")
def too_few_inputs(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["x"]))


@case(_NODE, "Add of one input", "node residual: Add with 1 input")
def add_of_one(folder: Path) -> Attempt:
    return _model(folder, _with(4, input=["x"]))


@case(_NODE, "MatMul of three inputs", "node up_proj: MatMul with 3 inputs")
def too_many_inputs(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["x", "up", "up"]))


@case(_NODE, "MatMul of an empty input", "node up_proj: its input B is left out")
def empty_input(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["x", ""]))


@case(_NODE, "MatMul of no output", "node up_proj: MatMul with 0 outputs")
def no_output(folder: Path) -> Attempt:
    nodes = _with(1, output=[])
    nodes[2].input[:] = ["x"]
    nodes[3].input[:] = ["x", "square"]
    return _model(folder, nodes, {"square": np.eye(32, dtype=np.float32)})


@case(_NODE, "an attribute that the operator does not have", "node up_proj: MatMul has no attribute colour")
def unknown_attribute(folder: Path) -> Attempt:
    return _model(folder, _with(1, colour=3))


@case(_NODE, "Gemm with a text for transB", "node up_proj: attribute transB")
def attribute_of_a_wrong_type(folder: Path) -> Attempt:
    return _model(folder, _with(1, op_type="Gemm", transB="yes"))


@case(_NODE, "Transpose of a weight with perm [5, 7]", "node turn: perm [5, 7]")
def transpose_out_of_range(folder: Path) -> Attempt:
    return _model(folder, _through(helper.make_node("Transpose", ["up"], ["w"], perm=[5, 7], name="turn")))


@case(_NODE, "Transpose of a weight with perm [0, 0]", "node turn: perm [0, 0]")
def transpose_of_one_axis(folder: Path) -> Attempt:
    return _model(folder, _through(helper.make_node("Transpose", ["up"], ["w"], perm=[0, 0], name="turn")))


@case(_NODE, "Transpose of a weight with a text for perm", "node turn: attribute perm")
def transpose_of_text(folder: Path) -> Attempt:
    return _model(folder, _through(helper.make_node("Transpose", ["up"], ["w"], perm="10", name="turn")))


@case(_NODE, "Cast of a weight to type 999", "node cast: it casts to the unknown type 999")
def cast_to_nothing(folder: Path) -> Attempt:
    return _model(folder, _through(helper.make_node("Cast", ["up"], ["w"], to=999, name="cast")))


@case(_NODE, "Cast of a weight without a type", "node cast: attribute to is missing")
def cast_without_type(folder: Path) -> Attempt:
    return _model(folder, _through(helper.make_node("Cast", ["up"], ["w"], name="cast")))


@case(_NODE, "Cast of a weight to strings and back", None)
def cast_to_strings(folder: Path) -> Attempt:
    first = helper.make_node("Cast", ["up"], ["s"], to=onnx.TensorProto.STRING, name="cast")
    return _model(folder, _through(first, helper.make_node("Cast", ["s"], ["w"], to=1, name="back")))


@case(_NODE, "DequantizeLinear of a weight without a scale", "node dq: DequantizeLinear with 1 input")
def dequantize_without_scale(folder: Path) -> Attempt:
    node = helper.make_node("DequantizeLinear", ["q"], ["w"], name="dq")
    return _model(folder, _through(node), {"q": np.ones((32, 48), np.int8)})


@case(_NODE, "DequantizeLinear of a weight along axis 9", "Name:'dq'", error=CalibrationError)
def dequantize_axis(folder: Path) -> Attempt:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=9, name="dq")
    return _model(folder, _through(node), {"q": np.ones((32, 48), np.int8), "s": np.ones(48, np.float32)})


@case(_NODE, "DequantizeLinear with a block size of -4", "'block_size' must be non-negative")
def dequantize_block(folder: Path) -> Attempt:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=-4, name="dq")
    return _model(folder, _through(node), {"q": np.ones((32, 48), np.int8), "s": np.ones((8, 48), np.float32)})


@case(_NODE, "DequantizeLinear with a scale of another shape", "Name:'dq'", error=CalibrationError)
def dequantize_scale_shape(folder: Path) -> Attempt:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dq")
    return _model(folder, _through(node), {"q": np.ones((32, 48), np.int8), "s": np.ones(7, np.float32)})


@case(_NODE, "a weight of strings", "node (up_proj) is invalid")
def weight_of_strings(folder: Path) -> Attempt:
    proto = base_model.model()
    text = helper.make_tensor("up", onnx.TensorProto.STRING, [32, 48], [b"x"] * (32 * 48))
    proto.graph.initializer[1].CopyFrom(text)
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_NODE, "a weight with another number of rows than the activation has channels", "Node (up_proj) Op (MatMul)")
def weight_of_other_rows(folder: Path) -> Attempt:
    return _model(folder, _with(1, input=["x", "wide"]), {"wide": np.ones((64, 48), np.float32)})
