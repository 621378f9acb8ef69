"""Graphs that are unusual but sound, and numbers at the edge: what must be handled, not refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import base_model
import numpy as np
import onnx
from case import Attempt, case
from onnx import helper, numpy_helper

from fptq_onnx.errors import CalibrationError
from fptq_onnx.report import Report

_ODD = "Unusual graphs"
_NUMBERS = "Numbers"


def _layers(*wanted: str) -> object:
    """A check that these nodes were quantized, and that the model still computes about the same."""

    def check(report: Report) -> None:
        assert set(wanted) <= {layer.name for layer in report.layers if layer.scheme != "float"}
        assert report.verification is not None and report.verification.kl_mean is not None
        assert 0 <= report.verification.kl_mean < 0.1, report.verification

    return check


def _model(
    folder: Path,
    nodes: Sequence[onnx.NodeProto] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> Attempt:
    proto = base_model.model(base_model.weights() | (extra or {}), nodes)
    return Attempt(base_model.save(proto, folder / "model.onnx"), overrides=dict(overrides))


@case(_ODD, "a weight shared by two nodes", None, check=_layers("up_proj", "again", "down_proj", "down_again"))
def shared_weight(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    more = [
        helper.make_node("MatMul", ["h", "up"], ["u2"], name="again"),
        helper.make_node("Tanh", ["u2"], ["t2"], name="activation2"),
        helper.make_node("MatMul", ["t2", "down"], ["d2"], name="down_again"),
        helper.make_node("Add", ["h", "d2"], ["h2"], name="residual2"),
    ]
    nodes[-1].input[0] = "h2"
    return _model(folder, [*nodes[:-1], *more, nodes[-1]])


@case(_ODD, "a weight that is read both as it is and transposed", None, check=_layers("up_proj", "down_proj"))
def weight_both_ways(folder: Path) -> Attempt:
    turn = helper.make_node("Transpose", ["up"], ["upT"], perm=[1, 0], name="turn")
    return _model(folder, [turn, *base_model.nodes(down="upT")])


@case(_ODD, "one weight for the embedding and lm_head", None, check=_layers("up_proj", "down_proj", "lm_head"))
def tied_weight(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    turn = helper.make_node("Transpose", ["embed"], ["tied"], perm=[1, 0], name="turn")
    nodes[-1].input[1] = "tied"
    return _model(folder, [turn, *nodes], None, **{"layers.lm_head": "int4"})


@case(_ODD, "a weight through Identity, Cast and Transpose", None, check=_layers("up_proj", "down_proj"))
def weight_through_nodes(folder: Path) -> Attempt:
    path = [
        helper.make_node("Identity", ["half"], ["h1"], name="same"),
        helper.make_node("Cast", ["h1"], ["h2"], to=1, name="cast"),
        helper.make_node("Transpose", ["h2"], ["w"], perm=[1, 0], name="turn"),
    ]
    half = base_model.weights()["up"].T.astype(np.float16)
    return _model(folder, [*path, *base_model.nodes(up="w")], {"half": half})


@case(_ODD, "layers in the branches of an If", None, check=_layers("up_proj", "down_proj"))
def layers_in_an_if(folder: Path) -> Attempt:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["h", "square"], [name], name=f"mm_{name}")
        return helper.make_graph([node], name, [], [base_model.value_info(name, None)])

    nodes = base_model.nodes()
    choose = helper.make_node("If", ["yes"], ["h2"], then_branch=branch("a"), else_branch=branch("b"), name="choose")
    nodes[-1].input[0] = "h2"
    extra = {"yes": np.array(True), "square": np.eye(32, dtype=np.float32)}
    return _model(folder, [*nodes[:-1], choose, nodes[-1]], extra)


@case(
    _ODD,
    "a layer in the body of a Loop that reads a quantized layer's output",
    None,
    check=_layers("up_proj", "down_proj"),
)
def layer_in_a_loop(folder: Path) -> Attempt:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "square"], ["m"], name="inner"),
            helper.make_node("Add", ["m", "d"], ["next"], name="sum"),
            helper.make_node("Identity", ["go"], ["on"], name="on"),
        ],
        "body",
        [
            base_model.value_info("i", [], onnx.TensorProto.INT64),
            base_model.value_info("go", [], onnx.TensorProto.BOOL),
            base_model.value_info("state", ["batch", "sequence", 32]),
        ],
        [base_model.value_info("on", [], onnx.TensorProto.BOOL), base_model.value_info("next", None)],
        [numpy_helper.from_array(np.eye(32, dtype=np.float32), "square")],
    )
    nodes = base_model.nodes()
    loop = helper.make_node("Loop", ["times", "", "h"], ["h2"], body=body, name="loop")
    nodes[-1].input[0] = "h2"
    return _model(folder, [*nodes[:-1], loop, nodes[-1]], {"times": np.array(2, np.int64)})


@case(
    _ODD,
    "a branch that reads a weight of the main graph that is quantized there",
    None,
    check=_layers("up_proj", "down_proj"),
)
def branch_reads_a_weight(folder: Path) -> Attempt:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["h", weight], [name], name=f"mm_{name}")
        return helper.make_graph([node], name, [], [base_model.value_info(name, None)])

    nodes = base_model.nodes()
    nodes[-1].input[:] = ["h3", "head"]
    choose = helper.make_node(
        "If", ["yes"], ["h2"], then_branch=branch("a", "up"), else_branch=branch("b", "up"), name="choose"
    )
    back = helper.make_node("MatMul", ["h2", "narrow"], ["h3"], name="back")
    extra = {"yes": np.array(True), "narrow": np.eye(48, 32, dtype=np.float32)}
    return _model(folder, [*nodes[:-1], choose, back, nodes[-1]], extra, **{"layers.exclude": ["back"]})


@case(_ODD, "nodes in reverse order", None, check=_layers("up_proj", "down_proj"))
def reversed_nodes(folder: Path) -> Attempt:
    return _model(folder, base_model.nodes()[::-1])


@case(_ODD, "nodes without names, and all of one name", None)
def nameless_nodes(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    for index, node in enumerate(nodes):
        node.name = "" if index % 2 else "same"
    return _model(folder, nodes)


@case(_ODD, "names with blanks, quotes, brackets, slashes and line breaks", None)
def strange_names(folder: Path) -> Attempt:
    nodes = base_model.nodes()
    for node in nodes:
        node.name = f"[bold]{node.name}[/] 'x' \"y\"\n../../{node.name}"
        for field in (node.input, node.output):
            field[:] = [n if n in ("input_ids", "logits", "embed") else f"../{n}\n%s [red]" for n in field]
    renamed = {n if n == "embed" else f"../{n}\n%s [red]": array for n, array in base_model.weights().items()}
    return Attempt(base_model.save(base_model.model(renamed, nodes), folder / "model.onnx"))


def _sized(folder: Path, inner: int) -> Attempt:
    rng = np.random.default_rng(1)
    arrays = base_model.weights() | {
        "up": rng.standard_normal((base_model.HIDDEN, inner)).astype(np.float32),
        "down": rng.standard_normal((inner, base_model.HIDDEN)).astype(np.float32),
    }
    return Attempt(base_model.save(base_model.model(arrays), folder / "model.onnx"))


@case(_ODD, "layers of one output and of one input channel", None, check=_layers("up_proj", "down_proj"))
def one_channel(folder: Path) -> Attempt:
    return _sized(folder, 1)


@case(_ODD, "layers of zero output and of zero input channels, beside sound ones", None, check=_layers("lm_head"))
def zero_channels(folder: Path) -> Attempt:
    attempt = _sized(folder, 0)
    attempt.overrides["layers.lm_head"] = "int4"
    return attempt


@case(_ODD, "sequences of one token", None, check=_layers("up_proj", "down_proj"))
def one_token(folder: Path) -> Attempt:
    attempt = _model(folder)
    attempt.overrides["calibration.length"] = 1
    return attempt


@case(_ODD, "a fixed batch of 0", "where the model takes [0, sequence]", error=CalibrationError)
def batch_of_zero(folder: Path) -> Attempt:
    inputs = [base_model.value_info("input_ids", [0, "sequence"], onnx.TensorProto.INT64)]
    return Attempt(base_model.save(base_model.model(inputs=inputs), folder / "model.onnx"))


@case(_ODD, "a fixed sequence of 0", "where the model takes [batch, 0]", error=CalibrationError)
def sequence_of_zero(folder: Path) -> Attempt:
    inputs = [base_model.value_info("input_ids", ["batch", 0], onnx.TensorProto.INT64)]
    return Attempt(base_model.save(base_model.model(inputs=inputs), folder / "model.onnx"))


@case(
    _ODD,
    "a vocabulary of no token",
    "no token embedding to draw random tokens for, or an empty one",
    error=CalibrationError,
)
def no_vocabulary(folder: Path) -> Attempt:
    arrays = base_model.weights() | {"embed": np.zeros((0, 32), np.float32), "head": np.zeros((32, 0), np.float32)}
    return Attempt(base_model.save(base_model.model(arrays), folder / "model.onnx"))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(folder: Path, name: str, value: float, index: object = (3, 5), dtype: object = np.float32) -> Attempt:
    arrays = {key: array.astype(dtype) for key, array in base_model.weights().items()}
    arrays[name][index] = value  # type: ignore[index]
    proto = base_model.model(arrays)
    if dtype is np.float16:
        proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_NUMBERS, "NaN in a weight", "activation t: is NaN or infinite", error=CalibrationError)
def nan_weight(folder: Path) -> Attempt:
    return _numbers(folder, "up", math.nan)


@case(_NUMBERS, "infinity in a weight", "activation h: is NaN or infinite", error=CalibrationError)
def inf_weight(folder: Path) -> Attempt:
    return _numbers(folder, "down", -math.inf)


@case(_NUMBERS, "NaN in the weight of a layer that stays float", "its output logits holds NaN or infinity")
def nan_in_a_float_layer(folder: Path) -> Attempt:
    attempt = _numbers(folder, "head", math.nan)
    attempt.overrides["layers.lm_head"] = "float"
    return attempt


@case(
    _NUMBERS,
    "NaN in the weight of the last layer, which no observed activation shows",
    "weight of lm_head (lm_head): it holds NaN or Inf",
)
def nan_in_the_last_layer(folder: Path) -> Attempt:
    attempt = _numbers(folder, "head", math.nan)
    attempt.overrides["layers.lm_head"] = "int4"
    return attempt


@case(_NUMBERS, "logits that overflow float16", "its output logits holds NaN or infinity")
def overflowing_logits(folder: Path) -> Attempt:
    return _numbers(folder, "embed", 6e4, np.s_[:], np.float16)


@case(_NUMBERS, "weights of 1e30", None)
def giant_weights(folder: Path) -> Attempt:
    return _numbers(folder, "up", 1e30)


@case(_NUMBERS, "a weight of zeros only", None, check=_layers("up_proj", "down_proj"))
def zero_weight(folder: Path) -> Attempt:
    return _numbers(folder, "down", 0.0, np.s_[:])


@case(_NUMBERS, "weights below the smallest normal float", None)
def subnormal_weights(folder: Path) -> Attempt:
    return _numbers(folder, "up", 1e-42, np.s_[:])


@case(_NUMBERS, "float16 weights below the smallest normal number", None)
def subnormal_half_weights(folder: Path) -> Attempt:
    return _numbers(folder, "up", 6e-8, np.s_[:], np.float16)


@case(_NUMBERS, "activations that are zero everywhere", None)
def zero_activations(folder: Path) -> Attempt:
    return _numbers(folder, "embed", 0.0, np.s_[:])


@case(_NUMBERS, "activations that are one constant everywhere", None)
def constant_activations(folder: Path) -> Attempt:
    return _numbers(folder, "embed", 2.5, np.s_[:])


@case(_NUMBERS, "activations below the smallest normal float", None)
def subnormal_activations(folder: Path) -> Attempt:
    return _numbers(folder, "embed", 1e-41, np.s_[:])


@case(
    _NUMBERS,
    "one activation channel of 1e30",
    "activation x: holds NaN, infinity, or values whose squares overflow float32",
    error=CalibrationError,
)
def giant_activation(folder: Path) -> Attempt:
    return _numbers(folder, "embed", 1e30, np.s_[:, 3])
