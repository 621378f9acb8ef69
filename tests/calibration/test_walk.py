"""A model run segment by segment gives the statistics and second moments of the model run whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import pytest
from sessions import unfused_session
from whole_model import observe

from fptq_onnx.calibration.moments import SecondMomentObserver
from fptq_onnx.calibration.observers import Observer, StatisticsObserver
from fptq_onnx.calibration.walk import Walk, weights_in_memory
from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.segments import find_segments
from fptq_onnx.storage.states import States
from fptq_onnx.storage.work_dir import WorkDir


def _observers(names: dict[str, int]) -> list[Observer]:
    moments = [SecondMomentObserver(name, k, math.inf) for name, k in names.items()]
    return [*(StatisticsObserver(name) for name in names), *moments]


def _results(observers: Sequence[Observer]) -> dict[str, bytes]:
    results = {}
    for observer in observers:
        if isinstance(observer, StatisticsObserver):
            parts = observer.statistics.to_dict()
        else:
            assert isinstance(observer, SecondMomentObserver)
            parts = {"fit": observer.moments.fit.seen, "held_out": observer.moments.held_out.seen}
        results |= {f"{observer.values[0]} {name}": array for name, array in parts.items()}
    return results


def _walk(model: ir.Model, batches: list[dict[str, np.ndarray]], states: States) -> list[Observer]:
    linears = find_linears(model)
    cut = find_segments(model, linears)
    groups = group_by_activation(linears.layers)
    walk = Walk(
        model,
        cut,
        describe_inputs(model),
        batches,
        states,
        leading_tokens=0,
        session_factory=unfused_session,
        last=len(cut) - 1,
    )
    done: list[Observer] = []
    for segment in cut:
        here = {str(g.activation.name): g.k for g in groups if cut.of(g.layers[0]) == segment.index}
        observers = _observers(here)
        walk.run(segment, observers)
        walk.done(segment)
        done += observers
    return done


def test_equals_the_uncut_model(tiny_model: families.TinyModel, tmp_path: Path) -> None:
    """Bit for bit in float32; in float16 the runtime keeps float32 between neighbours, but not over a cut."""
    model = load_model(tiny_model.path)
    rng = np.random.default_rng(1)
    batches = [{"input_ids": rng.integers(0, tiny_model.vocab_size, (2, length))} for length in (7, 4, 9, 5)]
    if tiny_model.is_decoder:  # padding on the left
        batches[1]["attention_mask"] = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    names = {str(g.activation.name): g.k for g in group_by_activation(find_linears(model).layers)}
    whole = _observers(names)
    observe(model, whole, batches, session_factory=unfused_session)
    work = WorkDir(tmp_path / "work", {}) if tiny_model.architecture == "llama" else None
    found, wanted = _results(_walk(model, batches, States(work, "test"))), _results(whole)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if tiny_model.dtype == "float16":
            assert found[name].shape == array.shape
            if not name.endswith("histogram"):
                scale = np.abs(array).max()
                np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-2 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    if work is not None:
        assert work.names("test") == []  # states of finished segments are gone


def test_takes_up_the_states_of_another_process(tmp_path: Path) -> None:
    model = load_model(families.model("llama", families.GENAI_FP32).path)
    cut = find_segments(model, find_linears(model))
    batches = [{"input_ids": np.arange(6)[None]}]

    def walk(states: States) -> Walk:
        return Walk(
            model,
            cut,
            describe_inputs(model),
            batches,
            states,
            leading_tokens=0,
            session_factory=unfused_session,
            last=len(cut) - 1,
        )

    def logits(walk: Walk) -> np.ndarray:
        (found,) = walk.expose(cut.segments[-1], ["logits"])
        return found["logits"]

    whole, work = walk(States(None, "")), WorkDir(tmp_path / "work", {})
    for segment in cut.segments[:-1]:
        whole.run(segment, [])
        walk(States(work, "x")).run(segment, [])  # each as a process of its own would
    np.testing.assert_array_equal(logits(walk(States(work, "x"))), logits(whole))


def test_no_data() -> None:
    model = load_model(families.model("llama", families.DYNAMO).path)
    with pytest.raises(CalibrationError, match="hold no batch"):
        _walk(model, [], States(None, ""))


def test_lazy_weights_are_computed_once() -> None:
    model = load_model(families.model("llama", families.DYNAMO).path)
    linears = find_linears(model)
    cut = find_segments(model, linears)
    weight = linears.by_label()["block.1.o"].weight
    array, reads = weight.const_value.numpy(), []

    def compute() -> ir.Tensor:
        reads.append(1)
        return ir.tensor(array)

    weight.const_value = lazy = ir.LazyTensor(compute, dtype=weight.dtype, shape=weight.shape, name=weight.name)
    with weights_in_memory(model, cut.segments[1]):
        assert not reads  # another block's
    with weights_in_memory(model, cut.segments[2]):
        for _ in range(3):
            np.testing.assert_array_equal(weight.const_value.numpy(), array)
    assert len(reads) == 1 and weight.const_value is lazy
