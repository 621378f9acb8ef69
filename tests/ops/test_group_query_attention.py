"""Attention ops: against onnxruntime's operator and float64, on every instruction set, in place, and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import op_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.ops import group_query_attention

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


@dataclass(frozen=True)
class Form:
    """One of the ops and its options."""

    packed: bool = True
    rotary: bool = True
    interleaved: bool = False
    scale: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Operands of one call by input name, in the order of the op."""

    form: Form
    heads: int
    kv_heads: int
    feeds: dict[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, the new ones included."""
        return self.feeds["seqlens_k"] + 1

    @property
    def rows(self) -> int:
        """New positions."""
        return int(next(iter(self.feeds.values())).shape[1])


def _problem(
    form: Form,
    *,
    rows: int = 3,
    pasts: tuple[int, ...] = (5,),
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    room: int = 0,
    seed: int = 0,
) -> Problem:
    """Sequences with `pasts` old and `rows` new tokens, and `room` unused places in the caches."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch, total = len(pasts), max(pasts) + rows
    if form.packed:
        feeds = {"qkv": normal(batch, rows, (heads + 2 * kv_heads) * size)}
    else:
        feeds = {"query": normal(batch, rows, heads * size)}
        feeds |= {name: normal(batch, rows, kv_heads * size) for name in ("key", "value")}
    length = total + room if room else max(pasts)
    feeds |= {name: normal(batch, kv_heads, length, size) for name in ("past_key", "past_value")}
    feeds["seqlens_k"] = np.array(pasts, np.int32) + np.int32(rows - 1)
    feeds["total_sequence_length"] = np.array(total, np.int32)
    if form.rotary:
        angle = rng.uniform(0, 6, (total + 2, size // 2))
        feeds |= {"cos_cache": np.cos(angle).astype(np.float32), "sin_cache": np.sin(angle).astype(np.float32)}
    return Problem(form, heads, kv_heads, feeds)


def _model(problem: Problem, shapes: dict[str, Any] | None = None) -> ir.Model:
    declared = {name: array.shape for name, array in problem.feeds.items()} | (shapes or {})
    inputs = {
        name: op_models.value(name, INT32 if array.dtype == np.int32 else FLOAT, declared[name])
        for name, array in problem.feeds.items()
    }
    names = list(inputs)
    cut = names.index("past_key")
    node = group_query_attention.group_query_attention(
        [inputs[name] for name in names[:cut]],
        [inputs[name] for name in names[cut : cut + 4]],
        [inputs[name] for name in names[cut + 4 :]],
        num_heads=problem.heads,
        kv_num_heads=problem.kv_heads,
        scale=problem.form.scale,
        rotary_interleaved=problem.form.interleaved,
        name="the_node",
    )
    for output, name in zip(node.outputs, ("Y", "present_key", "present_value"), strict=True):
        output.name = name
    model = op_models.model_of([node], list(inputs.values()), [])
    model.graph.opset_imports["com.microsoft"] = 1
    return model


def _run(problem: Problem, **options: Any) -> list[np.ndarray]:
    return op_models.run(_model(problem), problem.feeds, **options)


def _valid(problem: Problem, outputs: list[np.ndarray]) -> list[np.ndarray]:
    """What padding at the end of a sequence does not touch: onnxruntime rotates it differently."""
    y, *caches = outputs
    first = problem.rows == int(problem.feeds["total_sequence_length"])
    valid = []
    for sequence, length in enumerate(problem.lengths):
        valid.append(y[sequence, : length if first else problem.rows])
        valid += [cache[sequence, :, :length] for cache in caches]
    return valid


def _assert_close(problem: Problem, got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(_valid(problem, got), _valid(problem, expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(np.abs(other).max(initial=0), 1e-30))


def _reference(problem: Problem) -> list[np.ndarray]:
    """Y of a problem without rotation, in float64, of one sequence."""
    feeds, heads, kv_heads = problem.feeds, problem.heads, problem.kv_heads
    size = feeds["past_key"].shape[3]
    past = int(problem.lengths[0]) - problem.rows
    flat = feeds["qkv"] if problem.form.packed else np.concatenate([feeds[n] for n in ("query", "key", "value")], -1)
    split = flat[0].reshape(problem.rows, -1, size).transpose(1, 0, 2)
    query, key, value = split[:heads], split[heads : heads + kv_heads], split[heads + kv_heads :]
    key, value = (
        np.concatenate([feeds[name][0, :, :past], new], axis=1)
        for name, new in (("past_key", key), ("past_value", value))
    )
    return [group_query_attention.reference(query, key, value, scale=problem.form.scale or size**-0.5)[None]]


FORMS = st.builds(Form, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.125, 0.3]))
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([16, 32, 48, 64, 96, 128]))


@settings(max_examples=60, deadline=None)
@given(FORMS, SIZES, st.integers(1, 70), st.integers(0, 200), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_agrees_with_the_runtime(
    form: Form, sizes: tuple[int, int, int], rows: int, past: int, room: int, seed: int
) -> None:
    """The function body is onnxruntime's operator; it takes head sizes that are multiples of 16."""
    group, kv_heads, size = sizes
    problem = _problem(
        form, rows=rows, pasts=(past,), heads=group * kv_heads, kv_heads=kv_heads, size=size, room=room, seed=seed
    )
    _assert_close(problem, _run(problem, threads=2), _run(problem, library=False))


@settings(max_examples=30, deadline=None)
@given(FORMS, st.lists(st.integers(1, 90), min_size=2, max_size=4), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_batches_of_sequences_of_different_length(form: Form, lengths: list[int], room: int, seed: int) -> None:
    """Prompts that are padded at their end, then one token more for each."""
    prompt = _problem(form, rows=max(lengths), pasts=(0,) * len(lengths), room=room, seed=seed)
    prompt.feeds["seqlens_k"][:] = np.array(lengths) - 1
    _assert_close(prompt, _run(prompt, threads=2), _run(prompt, library=False))
    token = _problem(form, rows=1, pasts=tuple(lengths), room=room, seed=seed)
    _assert_close(token, _run(token, threads=2), _run(token, library=False))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (7, 0), (1, 33), (9, 400)])
def test_is_attention(packed: bool, rows: int, past: int) -> None:
    problem = _problem(Form(packed, rotary=False), rows=rows, pasts=(past,), size=24)
    y = _run(problem)[0]
    np.testing.assert_allclose(y, _reference(problem)[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("form", [Form(), Form(packed=False, interleaved=True), Form(rotary=False)], ids=str)
def test_every_instruction_set_and_number_of_threads(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, pasts in ((130, (0,)), (1, (700, 300)), (20, (90,))):
        problem = _problem(form, rows=rows, pasts=pasts, heads=6, kv_heads=2, size=64)
        expected = _run(problem, library=False)
        for name in op_models.available_kernels():
            monkeypatch.setenv(op_models.ISA_VARIABLE, name)
            got = [_run(problem, threads=threads) for threads in (1, 2, 3)]
            _assert_close(problem, got[0], expected)
            for other in got[1:]:
                for one, two in zip(got[0], other, strict=True):
                    np.testing.assert_array_equal(one, two, err_msg=name)


@pytest.mark.parametrize("form", [Form(), Form(packed=False)], ids=str)
def test_appends_in_place(form: Form) -> None:
    """As onnxruntime-genai does: past and present are one buffer, of which only new positions are written."""
    problem = _problem(form, rows=4, pasts=(9, 2), room=6)
    expected = _run(problem)
    session = op_models.open_session(_model(problem), threads=2)
    binding = session.io_binding()
    caches = {name: ort.OrtValue.ortvalue_from_numpy(problem.feeds[f"past_{name}"].copy()) for name in ("key", "value")}
    for name, array in problem.feeds.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, array)
    for name, value in caches.items():
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    binding.bind_output("Y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[-1], expected[0])
    for i, name in enumerate(caches):
        array, before = caches[name].numpy(), problem.feeds[f"past_{name}"]
        for sequence, length in enumerate(problem.lengths):
            np.testing.assert_array_equal(array[sequence, :, :length], expected[1 + i][sequence, :, :length])
            np.testing.assert_array_equal(array[sequence, :, length:], before[sequence, :, length:])
            np.testing.assert_array_equal(expected[1 + i][sequence, :, length:], 0)


def test_shapes_are_inferred_and_pass_the_checker() -> None:
    problem = _problem(Form(packed=False))
    symbolic = {"query": ["b", "s", 64], "key": ["b", "s", 32], "value": ["b", "s", 32]}
    symbolic |= {name: ["b", 2, "p", 16] for name in ("past_key", "past_value")}
    model = _model(problem, symbolic)
    onnx.checker.check_model(ir.serde.serialize_model(model))
    shapes = [output.shape for output in op_models.open_session(model).get_outputs()]
    assert shapes[0] == ["b", "s", 64]
    assert [shape[:2] + shape[3:] for shape in shapes[1:]] == [["b", 2, 16]] * 2
    assert shapes[1][2] not in ("p", "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (1, 3, 127)}, r"qkv has shape \[1, 3, 127\]. Its last dimension must be 8"),
        ({"qkv": (3, 128)}, r"qkv has shape \[3, 128\]. It must be \[batch, new positions"),
        ({"qkv": (1, 0, 128)}, "at least one new position"),
        ({"past_key": (1, 2, 5, 15)}, r"past_key has shape \[1, 2, 5, 15\]. It must be \[1, 2, 5, 16\]"),
        ({"past_value": (1, 2, 4, 16)}, r"past_value has shape \[1, 2, 4, 16\]. It must be \[1, 2, 5, 16\]"),
        ({"cos_cache": (7, 8), "sin_cache": (7, 8)}, "at least 8 positions and from 1 to 8 pairs"),
        ({"cos_cache": (9, 9), "sin_cache": (9, 9)}, "at least 8 positions and from 1 to 8 pairs"),
        ({"sin_cache": (9, 7)}, r"sin_cache has shape \[9, 7\]"),
        ({"seqlens_k": np.array([8], np.int32)}, r"seqlens_k\[0\] is 8"),
        ({"seqlens_k": np.array([1], np.int32)}, r"seqlens_k\[0\] is 1"),
        ({"seqlens_k": np.array([7, 7], np.int32)}, r"seqlens_k has shape \[2\]. It must be \[1\]"),
        ({"total_sequence_length": np.array(9, np.int32)}, r"is 9. With 3 new positions .* from 3 to 8"),
        ({"total_sequence_length": np.array(2, np.int32)}, "is 2. With 3"),
        ({"total_sequence_length": np.array([8, 8], np.int32)}, r"total_sequence_length has shape \[2\]"),
    ],
)
def test_what_a_call_gets_is_checked(change: dict[str, Any], message: str) -> None:
    problem = _problem(Form())
    given = {n: np.zeros(v, np.float32) if isinstance(v, tuple) else v for n, v in change.items()}
    model = _model(problem, dict.fromkeys(problem.feeds))
    with pytest.raises(Exception, match=f"PackedRotaryGroupQueryAttention node 'the_node': .*{message}"):
        op_models.open_session(model).run(None, problem.feeds | given)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("num_heads", None, "'num_heads' is missing"),
        ("num_heads", 0, "num_heads is 0. Use a number from 1"),
        ("num_heads", 3, "num_heads must be a multiple of kv_num_heads"),
        ("num_heads", 2.0, "'num_heads' is missing or is not an integer"),
        ("scale", float("nan"), "scale is nan"),
        ("scale", -1.0, "scale is -1"),
        ("rotary_interleaved", 2, "rotary_interleaved is 2. Use 0 or 1"),
        ("num_heads", 10, r"qkv has shape \[1, 3, 128\]. Its last dimension must be 14"),
    ],
)
def test_attributes_are_checked(attribute: str, value: float | None, message: str) -> None:
    model = _model(_problem(Form()))
    node = next(iter(model.graph))
    del node.attributes[attribute]
    if value is not None:
        make = ir.AttrInt64 if isinstance(value, int) else ir.AttrFloat32
        node.attributes.add(make(attribute, value))
    with pytest.raises(Exception, match=f"PackedRotaryGroupQueryAttention node 'the_node': .*{message}"):
        op_models.open_session(model)


def test_a_cache_that_is_too_short_for_the_buffer_is_refused() -> None:
    """Positions past the end of a bound buffer would be written behind it."""
    problem = _problem(Form(), rows=4, pasts=(9,), room=6)
    problem.feeds["total_sequence_length"] = np.array(25, np.int32)
    problem.feeds["seqlens_k"][:] = 24
    with pytest.raises(Exception, match=r"total_sequence_length is 25. .* from 4 to 23"):
        _run(problem)
