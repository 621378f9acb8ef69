"""Statistics reduced inside the graph equal those of the exposed activations, however the data are split."""

from __future__ import annotations

from collections.abc import Sequence

import families
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import unfused_session
from whole_model import ObservedActivation, calibrate, observe

from fptq_onnx.calibration.memory_session import memory_session
from fptq_onnx.calibration.nodes import NodeBuilder
from fptq_onnx.calibration.observation import build_observation
from fptq_onnx.calibration.observers import Observer, StatisticsObserver, TokenGroup
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.quantization.statistics import ActivationStatistics

K, VOCABULARY = 5, 11
RNG = np.random.default_rng(5)
# Products and sums of small integers are exact in float32 in any order.
TABLE = RNG.integers(-9, 10, (VOCABULARY, K))
WEIGHT = RNG.integers(-3, 4, (K, K))


def literal(array: np.ndarray) -> str:
    return "{" + ", ".join(str(x) for x in array.ravel()) + "}"


def token_model(opset: int = 21) -> ir.Model:
    """Activations of every rank and type: see `activations_of`. "pooled" has one row per sequence."""
    return ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        tokens (int64[b, s] input_ids, int64[b, t] attention_mask) => (float[b, s, {K}] logits, float[b, {K}] first)
        <float[{VOCABULARY}, {K}] table = {literal(TABLE)}, float[{K}, {K}] weight = {literal(WEIGHT)},
         int64[2] rows = {{-1, {K}}}, int64[4] heads = {{0, 0, 1, {K}}}, int64 zero = {{0}}>
        {{
            embedded = Gather(table, input_ids)
            half = Cast<to = 10>(embedded)
            brain = Cast<to = 16>(embedded)
            single = Cast<to = 1>(half)
            hidden = MatMul(single, weight)
            flat = Reshape(hidden, rows)
            headed = Reshape(hidden, heads)
            pooled = Gather<axis = 1>(hidden, zero)
            logits = MatMul(hidden, weight)
            other = Cast<to = 1>(brain)
            first = MatMul(pooled, weight)
        }}""")


ALIGNED = ("embedded", "half", "brain", "hidden", "flat", "headed")


def activations_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    embedded = TABLE[ids]
    hidden = embedded @ WEIGHT
    return {"embedded": embedded, "half": embedded, "brain": embedded, "hidden": hidden, "flat": hidden,
            "headed": hidden[:, :, None], "pooled": hidden[:, 0]}  # fmt: skip


def assert_same(a: ActivationStatistics, b: ActivationStatistics, what: str = "") -> None:
    for name, array in a.to_dict().items():
        np.testing.assert_array_equal(array, b.to_dict()[name], err_msg=f"{what}.{name}")
        assert array.tobytes() == b.to_dict()[name].tobytes(), f"{what}.{name}: sign of a zero"


@pytest.mark.parametrize("opset", [16, 17, 18, 21, 23])
def test_every_rank_and_type(opset):
    ids = RNG.integers(0, VOCABULARY, (3, 4))
    model = token_model(opset)
    result = calibrate(model, [*ALIGNED, "pooled", "hidden"], [{"input_ids": ids}])
    assert list(result) == [*ALIGNED, "pooled"]
    for name, expected in activations_of(ids).items():
        assert_same(result[name].all, ActivationStatistics.from_activations(expected), name)
        assert result[name].leading is None


sequences = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=6, max_size=6), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(sequences, st.data())
def test_batching_never_changes_a_statistic(rows, data):
    ids = np.array(rows, np.int64)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=3)) - {len(ids)})
    leading = data.draw(st.integers(0, 7))
    model = token_model()

    def run(batches: list[np.ndarray]) -> dict[str, ObservedActivation]:
        feeds = [{"input_ids": batch} for batch in batches]
        return calibrate(model, [*ALIGNED, "pooled"], feeds, leading_tokens=leading)

    whole, split = run([ids]), run(np.split(ids, cuts))
    for name, expected in activations_of(ids).items():
        assert_same(whole[name].all, split[name].all, name)
        assert_same(whole[name].rest, split[name].rest, name)
        first = np.zeros((len(ids), 6), bool)
        first[:, :leading] = True
        if name == "pooled":
            head, rest = expected[:0], expected
        else:
            flat = expected.reshape(-1, K)
            head, rest = flat[first.ravel()], flat[~first.ravel()]
        assert_same(whole[name].rest, ActivationStatistics.from_activations(rest), name)
        if leading:
            assert_same(split[name].leading, ActivationStatistics.from_activations(head), name)


@settings(max_examples=20, deadline=None)
@given(sequences, st.data())
def test_chunking_sequences_into_tokens_never_changes_a_statistic(rows, data):
    """Without attention a token does not depend on its neighbours, so sequences may be cut anywhere."""
    ids = np.array(rows, np.int64)
    cuts = sorted(data.draw(st.sets(st.integers(1, 5), max_size=3)))
    pieces = [{"input_ids": row[None, part]} for row in ids for part in np.split(np.arange(6), cuts)]
    model = token_model()
    whole, split = (calibrate(model, ALIGNED, feeds) for feeds in ([{"input_ids": ids}], pieces))
    for name in ALIGNED:
        assert_same(whole[name].all, split[name].all, name)


@settings(max_examples=20, deadline=None)
@given(sequences, st.integers(0, 3), st.data())
def test_padding_is_not_counted(rows, leading, data):
    ids = np.array(rows, np.int64)
    mask = np.array(data.draw(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6),
                                       min_size=len(ids), max_size=len(ids))))  # fmt: skip
    mask[0, data.draw(st.integers(0, 5))] = 1
    real = mask.astype(bool)
    first = real & (np.cumsum(mask, axis=1) <= leading)
    # An unpadded batch before and after: masks are built in when the first padded batch comes.
    full = np.zeros((2, 6), np.int64)
    feeds = [{"input_ids": full}, {"input_ids": ids, "attention_mask": mask}, {"input_ids": full}]
    result = calibrate(token_model(), ALIGNED, feeds, leading_tokens=leading)
    for name in ALIGNED:
        flat = activations_of(np.concatenate([full, ids, full]))[name].reshape(-1, K)
        ones, lead = np.ones((2, 6), bool), np.broadcast_to(np.arange(6) < leading, (2, 6))
        every, head = np.concatenate([ones, real, ones]).ravel(), np.concatenate([lead, first, lead]).ravel()
        assert_same(result[name].rest, ActivationStatistics.from_activations(flat[every & ~head]), name)
        if leading:
            assert_same(result[name].leading, ActivationStatistics.from_activations(flat[head]), name)


def test_real_models_equal_their_exposed_activations(tiny_model):
    """The oracle exposes the activations themselves, unfused, as fusions depend on what is exposed."""
    model = ir.load(tiny_model.path)
    linear = [node for node in model.graph if node.op_type in ("MatMul", "Gemm") and node.inputs[1].is_initializer()]
    names = list(dict.fromkeys(node.inputs[0].name for node in linear))
    observers = [StatisticsObserver(name) for name in names]
    ids = tiny_model.token_ids(batch=3, length=8)
    # The runtime's own float arithmetic may depend on the batch, so the oracle runs the same batches.
    batches = [describe_inputs(model).feeds(part) for part in (ids[:1], ids[1:])]
    before = ir.to_proto(model).SerializeToString()
    observe(model, observers, batches, session_factory=unfused_session)
    assert ir.to_proto(model).SerializeToString() == before
    exposed = model.clone()
    values = {value.name: value for node in exposed.graph for value in node.outputs}
    exposed.graph.outputs[:] = [values[name] for name in names]
    arrays = [unfused_session(exposed).run(None, feeds) for feeds in batches]
    assert names
    for name, observer, first, second in zip(names, observers, *arrays, strict=True):
        expected = ActivationStatistics.from_activations(first).merge(ActivationStatistics.from_activations(second))
        if tiny_model.dtype == "float32":
            assert_same(observer.statistics, expected, name)
            continue
        # The CPU provider computes float16 graphs in float32 and rounds what it exposes; rounding keeps the order.
        for field in ("channel_min", "channel_max", "token_absmax"):
            observed, exposed_field = (getattr(s, field).astype(np.float16) for s in (observer.statistics, expected))
            np.testing.assert_array_equal(observed, exposed_field, err_msg=f"{name}.{field}")


def test_optimized_and_unfused_sessions_agree(tiny_llama):
    model = ir.load(tiny_llama.path)
    names = list(dict.fromkeys(n.inputs[0].name for n in model.graph if n.op_type == "MatMul" and n.name))
    observers = [StatisticsObserver(name) for name in names]
    batches = [{"input_ids": tiny_llama.token_ids()}]
    observe(model, observers, batches, session_factory=unfused_session)
    tolerance = 1e-4 if tiny_llama.dtype == "float32" else 2e-2
    for name, observer in zip(names, observers, strict=True):
        optimized = calibrate(model, [name], batches)[name].all
        assert optimized.absmax == pytest.approx(observer.statistics.absmax, rel=tolerance)


def test_lm_head_is_computed_only_when_observed():
    tiny = families.model("llama", families.DYNAMO_KV)
    model = ir.load(tiny.path)
    nodes = list(model.graph)
    query = next(node for node in nodes if node.op_type == "MatMul")
    observation = build_observation(model, [StatisticsObserver(query.inputs[0].name)], select_tokens=False)
    assert len(observation.model.graph) < len(nodes) / 2
    assert query.name not in [node.name for node in observation.model.graph]
    assert len(observation.model.graph.outputs) == 6


class GramObserver(Observer):
    """Sum of X^T Y over all tokens: what Hessian observers will be made of."""

    def __init__(self, *values: str, tokens: TokenGroup = TokenGroup.ALL) -> None:
        super().__init__(*values, tokens=tokens)
        self.total = 0.0

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        return [nodes.op("MatMul", nodes.op("Transpose", tokens[0], perm=(1, 0)), tokens[1])]

    def fold(self, *arrays: np.ndarray) -> None:
        self.total += arrays[0].astype(np.float64)


@pytest.mark.parametrize("values", [("hidden", "embedded"), ("embedded", "hidden"), ("half", "half")])
def test_an_observer_may_read_several_values(values):
    ids = RNG.integers(0, VOCABULARY, (4, 3))
    observers = [GramObserver(*values), StatisticsObserver("embedded"), GramObserver(*values, tokens=TokenGroup.REST)]
    observe(token_model(), observers, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}], leading_tokens=1)
    x, y = (activations_of(ids)[name] for name in values)
    np.testing.assert_array_equal(observers[0].total, np.einsum("bsi,bsj->ij", x, y))
    np.testing.assert_array_equal(observers[2].total, np.einsum("bsi,bsj->ij", x[:, 1:], y[:, 1:]))


def value_model(dtype: str = "float") -> ir.Model:
    return ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 21]>
        values ({dtype}[t, k] x) => ({dtype}[t, k] y) {{ doubled = Add(x, x)  y = Neg(doubled) }}""")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_non_finite_activations_are_named(bad, dtype):
    x = np.ones((33, 130), dtype)
    x[17, 101] = bad
    model = value_model("float" if dtype is np.float32 else "float16")
    with pytest.raises(
        CalibrationError, match=r"^calibration batch 2, activation doubled: is NaN or infinite in 1 of 33"
    ):
        calibrate(model, ["doubled"], [{"x": np.ones((33, 130), dtype)}, {"x": x}])


def test_magnitudes_beyond_the_histogram_fall_in_its_last_bin():
    x = np.array([[0.0, -0.0, 1e-40, 3e38], [65536.0, -65535.9, 1e9, -1e-45]], np.float32)
    for name, sign in (("x", 1), ("y", -2)):
        with np.errstate(over="ignore"):
            expected = x / 4 * np.float32(sign)
        assert_same(
            calibrate(value_model(), [name], [{"x": x / 4}])[name].all,
            ActivationStatistics.from_activations(expected),
        )


def test_weights_of_any_kind_reach_the_session(tmp_path):
    """Inline, in memory, in one external file, in two folders, and in a type numpy does not have."""
    rng = np.random.default_rng(0)
    big = rng.standard_normal((64, 64)).astype(np.float32)
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        weights (float[t, 64] x) => (float[t, 64] y)
        <float[1] w1 = {1}, float[1] w2 = {1}, float[1] w3 = {1}, float[1] w4 = {1}, float[1] w5 = {1}>
        {
            a = MatMul(x, w1)
            b = MatMul(a, w2)
            c = Cast<to = 1>(w3)
            d = MatMul(b, c)
            e = Cast<to = 1>(w5)
            f = MatMul(d, e)
            y = Mul(f, w4)
        }""")
    int4 = rng.integers(-8, 8, (64, 64)).astype(ml_dtypes.int4)
    arrays = [big, big.T.copy(), big.astype(ml_dtypes.bfloat16), np.ones(64, np.float32), int4]
    for index, array in enumerate(arrays, start=1):
        value = model.graph.initializers[f"w{index}"]
        value.const_value = ir.tensor(array, name=value.name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    expected = x @ big @ big.T @ arrays[2].astype(np.float32) @ int4.astype(np.float32)

    def check(candidate: ir.Model) -> None:
        np.testing.assert_allclose(
            memory_session(candidate, threads=1).run(None, {"x": x})[0], expected, rtol=1e-3, atol=1
        )

    check(model)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        ir.save(model, folder / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded, other = (ir.load(folder / "m.onnx") for folder in folders)
    check(loaded)
    loaded.graph.initializers["w2"].const_value = other.graph.initializers["w2"].const_value
    check(loaded)
    assert all(isinstance(loaded.graph.initializers[f"w{i}"].const_value, ir.ExternalTensor) for i in (1, 4, 5))


@pytest.mark.parametrize(
    ("activations", "batches", "kwargs", "reason"),
    [
        (["hidden"], [], {}, "calibration data: hold no batch"),
        (["absent"], [{"input_ids": np.ones((1, 2), np.int64)}], {}, "activation absent: is not a value"),
        (["input_ids"], [{"input_ids": np.ones((1, 2), np.int64)}], {}, "activation input_ids: has type INT64"),
        (["hidden"], [{"input_ids": np.full((1, 2), VOCABULARY)}], {}, "batch 1: holds token id 11"),
        (["hidden"], [{"attention_mask": np.ones((1, 2), np.int64)}], {}, "batch 1, input input_ids: is missing"),
        (
            ["hidden"],
            [{"input_ids": np.ones((1, 2), np.int64), "attention_mask": np.zeros((1, 2), np.int64)}],
            {},
            "batch 1: holds only padding",
        ),
    ],
)
def test_data_and_names_that_do_not_fit(activations, batches, kwargs, reason):
    with pytest.raises(CalibrationError, match=reason):
        calibrate(token_model(), activations, batches)


def test_leading_tokens_take_sequences():
    with pytest.raises(CalibrationError, match="has no token ids to tell leading tokens by"):
        calibrate(value_model(), ["x"], [{"x": np.ones((2, 3), np.float32)}], leading_tokens=1)


def test_old_opsets_are_refused():
    with pytest.raises(CalibrationError, match="uses opset 15"):
        calibrate(token_model(15), ["hidden"], [{"input_ids": np.ones((1, 2), np.int64)}])


def test_channels_must_not_change():
    with pytest.raises(CalibrationError, match="batch 2, activation doubled: has 4 channels after 3"):
        calibrate(value_model(), ["doubled"], [{"x": np.ones((2, k), np.float32)} for k in (3, 4)])


def test_runtime_failures_name_the_batch():
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 21]>
        sums (float[t, k] x, float[u, k] z) => (float[t, k] y) { y = Add(x, z)  }""")
    feeds = {"x": np.ones((2, 3), np.float32), "z": np.ones((5, 3), np.float32)}
    with pytest.raises(CalibrationError, match=r"^calibration batch 1: cannot be run"):
        calibrate(model, ["y"], [feeds])
