import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.quantization.fallback import Step, fall_back, keep_float, step_of
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.policy import Scheme

LABELS = ("q", "k", "v", "o", "up", "down")
ACTIVATIONS = ("x", "x", "x", "y", "z", "w")


def plan(scheme=Scheme.STATIC):
    return Plan(
        tuple(
            LayerPlan(label, label, "other", 0, 8, 8, activation, 1.0, scheme, "none", "signed8", 8, "range 1")
            for label, activation in zip(LABELS, ACTIVATIONS, strict=True)
        )
    )


def errors(*static):
    return {
        label: {Step.STATIC: e, Step.PER_TOKEN: 0.6 * e, Step.INT8: 0.1 * e, Step.FLOAT: 0.0}
        for label, e in zip(LABELS, static, strict=True)
    }


def total(found, table):
    return sum(table[layer.label][step_of(layer)] for layer in found.layers)


def test_the_worst_layers_stay_float():
    kept = keep_float(plan(), errors(1, 9, 2, 3, 8, 4), 2)
    assert {layer.label for layer in kept.layers if not layer.is_quantized} == {"k", "up"}
    assert "largest output error" in kept["k"].reason
    kept.check()
    assert keep_float(plan(), errors(1, 9, 2, 3, 8, 4), 0) == plan()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-6, 10), min_size=6, max_size=6), st.floats(0, 1))
def test_the_errors_fall_to_the_fraction_and_the_plan_stays_consistent(static, fraction):
    table = errors(*static)
    found = fall_back(plan(), table, fraction)
    found.check()
    assert total(found, table) <= fraction * total(plan(), table) + 1e-9
    for before, after in zip(plan().layers, found.layers, strict=True):
        assert list(Step).index(step_of(after)) >= list(Step).index(step_of(before))


def test_layers_of_one_activation_leave_static_together_and_fall_further_alone():
    table = errors(10, 1, 1, 0.1, 0.1, 0.1)
    first = fall_back(plan(), table, 0.99)
    assert [step_of(first[label]) for label in LABELS] == [Step.PER_TOKEN] * 3 + [Step.STATIC] * 3
    second = fall_back(first, table, 0.5)
    assert step_of(second["q"]) is Step.INT8 and step_of(second["k"]) is Step.PER_TOKEN
    assert fall_back(second, table, 1) == second


def test_nothing_is_left_but_float_where_no_error_is_allowed():
    found = fall_back(plan(), errors(1, 1, 1, 1, 1, 1), 0)
    assert {step_of(layer) for layer in found.layers} == {Step.FLOAT}


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, Step.STATIC),
        ({"scheme": Scheme.PER_TOKEN}, Step.PER_TOKEN),
        ({"weight_method": "int8"}, Step.INT8),
        ({"scheme": Scheme.FLOAT, "weight_method": "float"}, Step.FLOAT),
    ],
)
def test_step_of(changes, step):
    assert step_of(dataclasses.replace(plan().layers[0], **changes)) is step
