"""A model whose residual stream was rotated must compute what it computed, and have no outlier channels left."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "graph"))
from graph_tools import model_from_text, run

from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.blocks import find_blocks
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.graph.norms import find_norms
from fptq_onnx.graph.producers import find_scale_site
from fptq_onnx.passes.apply_equalization import ApplyEqualizationPass
from fptq_onnx.passes.rotate_heads import RotateHeadsPass
from fptq_onnx.passes.rotate_residual import ResidualRotation, RotateResidualPass
from fptq_onnx.quantization.rotate import random_rotation

DECODERS = [names for names in families.ALL_MODELS if names[0].startswith(("llama", "qwen2"))]
LAYERNORMS = [names for names in families.ALL_MODELS if names not in DECODERS]


def _rotate(model: ir.Model, seed: int = 0) -> ResidualRotation:
    rotate = RotateResidualPass(seed)
    assert rotate(model).modified
    assert rotate.refused is None
    assert rotate.applied is not None
    return rotate.applied


def _tolerance(tiny: families.TinyModel) -> float:
    return 2e-2 if tiny.dtype == "float16" else 1e-4


def _assert_same(after: np.ndarray, before: np.ndarray, tolerance: float) -> None:
    expected = before.astype(np.float32)
    np.testing.assert_allclose(after.astype(np.float32), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("names", DECODERS, ids="-".join)
def test_outputs_and_cache_stay_as_they_are(names: tuple[str, str], tmp_path: Path) -> None:
    tiny = families.model(*names)
    model = load_model(tiny.path)
    feeds = tiny.feeds(tiny.token_ids())
    before = run(model, feeds, tmp_path)
    applied = _rotate(model)
    after = run(model, feeds, tmp_path)
    assert after.keys() == before.keys()
    for name in before:
        _assert_same(after[name], before[name], _tolerance(tiny))
    assert applied.hidden == families.HIDDEN
    assert applied.norms == 2 * tiny.blocks  # all but the final one
    untied = names[0] == "llama-untied"
    assert applied.into_table is untied
    assert len(applied.nodes) == (1 if untied else 2)


@pytest.mark.parametrize("names", DECODERS, ids="-".join)
def test_layers_blocks_and_scale_sites_are_found_as_before(names: tuple[str, str]) -> None:
    model = load_model(families.model(*names).path)

    def describe() -> list[object]:
        linears = find_linears(model)
        sites = [(g.layers[0].label, find_scale_site(model, g, linears)) for g in group_by_activation(linears.layers)]
        return [
            [(layer.label, layer.k, layer.n, layer.bias is None) for layer in linears.layers],
            [[layer.label for layer in block.layers] for block in find_blocks(model, linears)],
            [(label, site.kind, site.scales_cache) for label, site in sites],
        ]

    before = describe()
    norms = len(find_norms(model))
    applied = _rotate(model)
    assert describe() == before
    assert len(find_norms(model)) == norms
    assert set(applied.nodes) <= {skipped.node_name for skipped in find_linears(model).skipped}


@pytest.mark.parametrize("family", families.LLAMA_FAMILIES)
def test_weights_of_embedding_final_norm_and_lm_head_are_not_touched(family: str) -> None:
    tiny = families.model("llama", family)
    model = load_model(tiny.path)

    def ends() -> tuple[bytes, bytes, bytes]:
        linears = find_linears(model)
        head = linears.by_label()["lm_head"]
        final = find_norms(model)[-1]
        table = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[0] is not None
                     and linears.flow.stream(node.outputs[0]) == 0)  # fmt: skip
        root = table.inputs[0]
        while root.producer() is not None:
            root = root.producer().inputs[0]
        values = (root, final.weight, head.weight)
        return tuple(value.const_value.tobytes() for value in values)

    before = ends()
    _rotate(model)
    assert ends() == before


def _spread(label: str, rotated: bool, tmp_path: Path) -> tuple[float, float]:
    """Largest channel, over the median channel and as it is, of what a layer reads."""
    tiny = families.model("llama", families.DYNAMO)
    model = load_model(tiny.path)
    if rotated:
        _rotate(model)
    layer = find_linears(model).by_label()[label]
    activation = run(model, tiny.feeds(tiny.token_ids()), tmp_path, [layer.activation])[layer.activation.name]
    channels = np.abs(activation.astype(np.float32)).reshape(-1, layer.k).max(axis=0)
    return float(channels.max() / np.median(channels)), float(channels.max())


def test_outlier_channels_are_spread(tmp_path: Path) -> None:
    before = {label: _spread(label, False, tmp_path) for label in ("block.1.q", "block.1.gate", "block.0.down")}
    after = {label: _spread(label, True, tmp_path) for label in before}
    for label in ("block.1.q", "block.1.gate"):
        assert before[label][0] > 10
        assert after[label][0] < 2
        assert after[label][1] < before[label][1] / 4
    # What down reads lies behind the gate, which no rotation of the stream reaches.
    np.testing.assert_allclose(after["block.0.down"], before["block.0.down"], rtol=1e-4)


def test_weights_are_what_the_formulas_say() -> None:
    tiny = families.model("qwen2", families.DYNAMO)
    model, rotated = load_model(tiny.path), load_model(tiny.path)
    _rotate(rotated, seed=3)
    q = random_rotation(families.HIDDEN, 3).matrix
    before, after = find_linears(model).by_label(), find_linears(rotated).by_label()
    gamma = {norm.output: norm.weight.const_value.numpy() for norm in find_norms(model)}
    for label in ("block.1.q", "block.2.up"):
        layer = before[label]
        expected = q.T @ (gamma[layer.activation][:, None] * layer.weight_array())
        np.testing.assert_allclose(after[label].weight_array(), expected, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(after[label].bias_array(), layer.bias_array()) if layer.bias else None
    np.testing.assert_allclose(after["block.0.o"].weight_array(), before["block.0.o"].weight_array() @ q, atol=1e-5)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def rotated(seed: int, folder: str) -> tuple[bytes, bytes]:
        model = load_model(families.model("llama-untied", families.GENAI_FP32).path)
        _rotate(model, seed)
        path = tmp_path / folder / "model.onnx"
        path.parent.mkdir()
        save_model(model, path)
        return path.read_bytes(), path.with_name("model.onnx.data").read_bytes()

    first = rotated(1, "a")
    assert rotated(1, "b") == first
    assert rotated(2, "c")[1] != first[1]


def test_weights_are_computed_when_read() -> None:
    model = load_model(families.model("llama", families.GENAI_FP32).path)
    _rotate(model)
    for layer in find_linears(model).layers:
        if layer.label != "lm_head":
            assert isinstance(layer.weight.const_value, ir.LazyTensor)


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32])
def test_decoding_continues_with_the_cache_of_the_model_before(family: str, tmp_path: Path) -> None:
    tiny = families.model("llama", family)
    tokens = tiny.token_ids(batch=1, length=9)
    model = load_model(tiny.path)
    first = run(model, tiny.feeds(tokens[:, :6]), tmp_path)
    following = tiny.feeds(tokens) | {"input_ids": tokens[:, 6:]}
    if "position_ids" in following:
        following["position_ids"] = following["position_ids"][:, 6:]
    past = [name for name in following if name.startswith("past_key_values")]
    following |= {name: first[name.replace("past_key_values", "present")] for name in past}
    before = run(model, following, tmp_path)
    _rotate(model)
    after = run(model, following, tmp_path)
    for name in before:
        _assert_same(after[name], before[name], 1e-4)


@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32])
def test_equalization_works_on_a_rotated_model(family: str, tmp_path: Path) -> None:
    tiny = families.model("qwen2", family)
    model = load_model(tiny.path)
    feeds = tiny.feeds(tiny.token_ids())
    before = run(model, feeds, tmp_path)["logits"]
    _rotate(model)
    assert RotateHeadsPass(seed=1)(model).modified
    rng = np.random.default_rng(5)
    groups = group_by_activation(find_linears(model).layers)
    ApplyEqualizationPass({g.activation.name: rng.uniform(0.5, 2, g.k).astype(np.float32) for g in groups})(model)
    _assert_same(run(model, feeds, tmp_path)["logits"], before, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32])
def test_smollm2_keeps_its_logits_and_loses_its_outliers(
    family: str, smollm2: Callable[[str], Path], tmp_path: Path
) -> None:
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 64))

    def measure(rotated: bool) -> tuple[np.ndarray, dict[str, float]]:
        model = load_model(smollm2(family))
        if rotated:
            _rotate(model)
        groups = [g for g in group_by_activation(find_linears(model).layers) if g.layers[0].block is not None]
        outputs = run(model, describe_inputs(model).feeds(tokens), tmp_path, [g.activation for g in groups])
        return outputs["logits"], {g.layers[0].label: float(np.abs(outputs[g.activation.name]).max()) for g in groups}

    logits, before = measure(False)
    rotated_logits, after = measure(True)
    _assert_same(rotated_logits, logits, 1e-4)
    reading = [label for label in before if label.endswith((".q", ".qkv", ".gate"))]
    assert len(reading) == 60
    assert max(before[label] for label in reading) > 20
    assert max(after[label] for label in reading) < 8
    down = [label for label in before if label.endswith(".down")]
    np.testing.assert_allclose([after[label] for label in down], [before[label] for label in down], rtol=1e-3)


# ---- refusals ------------------------------------------------------------------------------------------------------


def _assert_refused(model: ir.Model, reason: str) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    rotate = RotateResidualPass()
    assert not rotate(model).modified
    assert rotate.applied is None
    assert rotate.refused is not None
    assert re.search(reason, rotate.refused), rotate.refused
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("names", LAYERNORMS, ids="-".join)
def test_layer_norm_is_refused(names: tuple[str, str]) -> None:
    _assert_refused(load_model(families.model(*names).path), "LayerNorm: it subtracts the mean")


def _insert(model: ir.Model, after: ir.Value, op_type: str, *operands: ir.Value, **attributes: object) -> ir.Value:
    """Put a node behind a value: whoever read the value reads its output."""
    node = ir.node(op_type, [after, *operands], attributes, name=f"extra_{op_type}")
    node.outputs[0].name = f"extra_{op_type}"
    node.outputs[0].type, node.outputs[0].shape = after.type, after.shape
    after.replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, after)
    model.graph.insert_after(after.producer(), [node])
    return node.outputs[0]


def _constant(model: ir.Model, array: np.ndarray) -> ir.Value:
    value = ir.Value(name="extra", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(array, name="extra")
    model.graph.register_initializer(value)
    return value


def _stream(model: ir.Model, index: int) -> ir.Value:
    return next(s.value for s in find_linears(model).flow.streams if s.index == index)


def _post_norm(model: ir.Model) -> None:
    layer = find_linears(model).by_label()["block.1.o"]
    gamma = _constant(model, np.linspace(0.5, 1.5, families.HIDDEN, dtype=np.float32))
    _insert(model, layer.output, "SimplifiedLayerNormalization", gamma, axis=-1, epsilon=1e-6, stash_type=1)


def _channel_gain(model: ir.Model) -> None:
    layer = find_linears(model).by_label()["block.1.down"]
    _insert(model, layer.output, "Mul", _constant(model, np.linspace(0.5, 1.5, families.HIDDEN, dtype=np.float32)))


def _hidden_states_output(model: ir.Model) -> None:
    model.graph.outputs.append(_stream(model, 2))


def _non_linear_reader(model: ir.Model) -> None:
    stream = _stream(model, 2)
    node = ir.node("Tanh", [stream], name="probe")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "probe", stream.type, stream.shape
    model.graph.insert_after(stream.producer(), [node])
    model.graph.outputs.append(node.outputs[0])


def _normed_stream_read_by_others(model: ir.Model) -> None:
    normed = find_linears(model).by_label()["block.1.gate"].activation
    node = ir.node("Sigmoid", [normed], name="router")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "router", normed.type, normed.shape
    model.graph.insert_after(normed.producer(), [node])
    model.graph.outputs.append(node.outputs[0])


def _shared_weight(model: ir.Model) -> None:
    layers = find_linears(model).by_label()
    layers["block.1.gate"].node.replace_input_with(1, layers["block.0.gate"].node.inputs[1])


def _non_linear_writer(model: ir.Model) -> None:
    _insert(model, find_linears(model).by_label()["block.1.o"].output, "Tanh")


@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_post_norm, "output is normalized .* before it is added to the residual stream"),
        (_channel_gain, "what the Mul node .* is added to the residual stream"),
        (_hidden_states_output, "the residual stream is an output of the graph"),
        (_non_linear_reader, "the residual stream is read by the Tanh node probe"),
        (_normed_stream_read_by_others, "the normed residual stream is read by the Sigmoid node router"),
        (_shared_weight, "the weight .* of block.0.gate is read by other nodes too"),
        (_non_linear_writer, "what the Tanh node .* is added to the residual stream"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_commute_is_refused(family: str, change: Callable[[ir.Model], None], reason: str) -> None:
    model = load_model(families.model("llama", family).path)
    change(model)
    _assert_refused(model, reason)


def test_a_second_rotation_of_a_tied_model_is_refused() -> None:
    model = load_model(families.model("llama", families.DYNAMO).path)
    _rotate(model)
    _assert_refused(model, "read by the MatMul node residual.rotate")


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    weights = {"w": np.eye(8, dtype=np.float32)}
    model = model_from_text(tmp_path, "(float[2, 3, 8] x) => (float[2, 3, 8] y)", "y = MatMul(x, w)", weights)
    _assert_refused(model, "no attention was found")


# ---- linear things on the stream that are fine ---------------------------------------------------------------------


def _assert_rotates(model: ir.Model, tiny: families.TinyModel, tmp_path: Path) -> None:
    feeds = tiny.feeds(tiny.token_ids())
    before = run(model, feeds, tmp_path)
    _rotate(model)
    after = run(model, feeds, tmp_path)
    for name in before:
        _assert_same(after[name], before[name], 1e-4)


def _embedding_scale(model: ir.Model) -> None:
    _insert(model, _stream(model, 0), "Mul", _constant(model, np.array(2.5, np.float32)))


def _positions(model: ir.Model) -> None:
    table = np.random.default_rng(2).normal(size=(1, 12, families.HIDDEN)).astype(np.float32)
    _insert(model, _stream(model, 0), "Add", _constant(model, table))


def _residual_multiplier(model: ir.Model) -> None:
    _insert(model, find_linears(model).by_label()["block.1.o"].output, "Mul", _constant(model, np.float32([0.3])))


def _output_bias(model: ir.Model) -> None:
    bias = _constant(model, np.linspace(-2, 2, families.HIDDEN, dtype=np.float32))
    _insert(model, find_linears(model).by_label()["block.1.down"].output, "Add", bias)


def _normed_output(model: ir.Model) -> None:
    model.graph.outputs.append(find_linears(model).by_label()["lm_head"].activation)


@pytest.mark.parametrize("family", [families.DYNAMO, families.GENAI_FP32])
@pytest.mark.parametrize("change", [_embedding_scale, _positions, _residual_multiplier, _output_bias, _normed_output])
def test_linear_maps_on_the_stream_commute(family: str, change: Callable[[ir.Model], None], tmp_path: Path) -> None:
    tiny = families.model("llama", family)
    model = load_model(tiny.path)
    change(model)
    _assert_rotates(model, tiny, tmp_path)


@pytest.mark.parametrize("names", [("llama", families.DYNAMO), ("llama-untied", families.DYNAMO)], ids="-".join)
def test_the_stream_behind_the_last_block_may_be_an_output(names: tuple[str, str], tmp_path: Path) -> None:
    tiny = families.model(*names)
    model = load_model(tiny.path)
    states = find_linears(model).flow.streams
    model.graph.outputs.append(states[-1].value)
    _assert_rotates(model, tiny, tmp_path)


def test_the_sum_of_the_last_skip_norm_may_be_read_too(tmp_path: Path) -> None:
    tiny = families.model("llama", families.GENAI_FP32)
    model = load_model(tiny.path)
    last = next(node for node in reversed(model.graph) if node.op_type == "SkipSimplifiedLayerNormalization")
    last.resize_outputs(4)
    last.outputs[1].name, last.outputs[2].name = "mean", "inverse_deviation"
    total = last.outputs[3]
    total.name, total.type, total.shape = "hidden_states", last.outputs[0].type, last.outputs[0].shape
    bias = _constant(model, np.linspace(-1, 1, families.HIDDEN, dtype=np.float32))
    last.resize_inputs(4)
    last.replace_input_with(3, bias)
    model.graph.outputs.append(total)
    _assert_rotates(model, tiny, tmp_path)


def test_hidden_states_from_outside_are_rotated_by_a_node(tmp_path: Path) -> None:
    tiny = families.model("llama", families.DYNAMO)
    model = load_model(tiny.path)
    graph = model.graph
    lookup = _stream(model, 0)
    given = ir.Value(name="inputs_embeds", type=lookup.type, shape=lookup.shape)
    lookup.replace_all_uses_with(given)
    graph.remove(lookup.producer(), safe=True)
    graph.inputs.append(given)
    hidden = np.random.default_rng(0).normal(size=(2, 12, families.HIDDEN)).astype(np.float32)
    feeds = tiny.feeds(tiny.token_ids()) | {"inputs_embeds": hidden}
    before = run(model, feeds, tmp_path)["logits"]
    assert not _rotate(model).into_table
    _assert_same(run(model, feeds, tmp_path)["logits"], before, 1e-4)
