"""From statistics to decisions and a plan."""

from __future__ import annotations

import dataclasses

import families
import numpy as np
import pytest
from conversions import recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.graph.activation_groups import ActivationGroup, group_by_activation
from fptq_onnx.graph.linears import LinearSearch, find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.planning import decide_groups, make_plan, observed_groups
from fptq_onnx.quantization.equalize import lae_scale, round_mantissa, smoothquant_scale
from fptq_onnx.quantization.plan import Plan
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.quantization.statistics import ActivationStatistics


@pytest.fixture(scope="module")
def linears() -> LinearSearch:
    return find_linears(load_model(families.model("llama", families.DYNAMO).path))


@pytest.fixture(scope="module")
def groups(linears: LinearSearch) -> list[ActivationGroup]:
    return group_by_activation(linears.layers)


def _statistics(groups: list[ActivationGroup], **peaks: float) -> dict[str, ActivationStatistics]:
    """Activations in -1..1 but for one channel that reaches the peak given by the label of the first reader."""
    found = {}
    for seed, group in enumerate(groups):
        x = np.random.default_rng(seed).uniform(-1, 1, (40, group.k)).astype(np.float32)
        x[0, 3] = peaks.get(group.layers[0].label.replace(".", "_"), 1.0)
        found[group.activation.name] = ActivationStatistics.from_activations(x)
    return found


PEAKS = {"block_0_q": 15.0, "block_1_q": 15.01, "block_1_o": 149.9, "block_2_down": 150.0, "lm_head": 80.0}


def test_policy_per_activation(linears: LinearSearch, groups: list[ActivationGroup]) -> None:
    settings = recipe()
    statistics = _statistics(groups, **PEAKS)
    decisions = decide_groups(groups, statistics, settings)
    assert [d.name for d in decisions] == [g.activation.name for g in groups[:-1]]  # lm_head stays float
    plan = make_plan(linears.layers, decisions, settings)
    assert [entry.label for entry in plan.layers] == [layer.label for layer in linears.layers]
    schemes = {entry.label: entry.scheme for entry in plan.layers}
    assert {schemes[f"block.0.{role}"] for role in "qkv"} == {Scheme.STATIC}
    assert {schemes[f"block.1.{role}"] for role in "qkvo"} == {Scheme.EQUALIZED_STATIC}
    assert schemes["block.2.down"] == Scheme.PER_TOKEN and schemes["lm_head"] == Scheme.FLOAT
    by_name = {d.name: d for d in decisions}
    entry = plan["block.1.v"]
    seen = statistics[entry.activation]
    scale = round_mantissa(lae_scale(seen.channel_absmax), 8)
    np.testing.assert_array_equal(by_name[entry.activation].decision.equalization_scale, scale)
    assert (entry.equalization, entry.weight_method, entry.group_size) == ("lae", "absmax7", 32)
    assert entry.activation_range == pytest.approx(15.01)
    assert plan["lm_head"].activation_range is None and plan["lm_head"].weight_method == "float"
    assert plan.recipe == settings.resolved()
    assert Plan.from_json(plan.to_json()) == plan


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_plan_is_a_pure_function(data: st.DataObject) -> None:
    """The same statistics and recipe give the same plan, in any order of the statistics, and change neither."""
    linears = find_linears(load_model(families.model("llama", families.DYNAMO).path))
    groups = group_by_activation(linears.layers)
    labels = [group.layers[0].label.replace(".", "_") for group in groups]
    peaks = {label: data.draw(st.floats(0.5, 4000, width=32)) for label in labels}
    chosen = recipe(
        activations__scheme=data.draw(st.sampled_from(["policy", "static", "per-token", "equalized-static"])),
        equalization__method=data.draw(st.sampled_from(["lae", "smoothquant", "none"])),
    )
    before, resolved = _statistics(groups, **peaks), chosen.resolved()
    first = make_plan(linears.layers, decide_groups(groups, before, chosen), chosen)
    shuffled = dict(data.draw(st.permutations(list(before.items()))))
    assert make_plan(linears.layers, decide_groups(groups, shuffled, chosen), chosen) == first
    assert chosen.resolved() == resolved
    for name, untouched in _statistics(groups, **peaks).items():
        np.testing.assert_array_equal(before[name].channel_min, untouched.channel_min)
        np.testing.assert_array_equal(before[name].channel_max, untouched.channel_max)


def test_only_activations_with_a_quantized_reader_are_observed(groups: list[ActivationGroup]) -> None:
    observed = observed_groups(groups, recipe(layers__exclude=(r"block\.0", r"block\.1\.[qk]")))
    labels = [group.layers[0].label for group in observed]
    assert labels[0] == "block.1.q"  # v takes part
    assert len(labels) == 8 and "lm_head" not in labels


def test_smoothquant_takes_the_weights_of_the_participants(groups: list[ActivationGroup]) -> None:
    settings = recipe(equalization__method="smoothquant", equalization__alpha=0.4, layers__exclude=(r".*\.q",))
    statistics = _statistics(groups, **PEAKS)
    group = next(g for g in groups if g.layers[0].label == "block.1.q")
    (decided,) = decide_groups([group], statistics, settings)
    peak = np.max([np.abs(layer.weight_array()).max(axis=1) for layer in group.layers[1:]], axis=0)
    wanted = round_mantissa(smoothquant_scale(statistics[decided.name].channel_absmax, peak, 0.4), 8)
    np.testing.assert_array_equal(decided.decision.equalization_scale, wanted)


def test_edited_plan_decides(linears: LinearSearch, groups: list[ActivationGroup]) -> None:
    """Also about layers that the recipe leaves out, and with another equalization than the recipe's."""
    settings = recipe()
    statistics = _statistics(groups, **PEAKS)
    plan = make_plan(linears.layers, decide_groups(groups, statistics, settings), settings)
    edits = {
        "lm_head": {"scheme": Scheme.PER_TOKEN, "weight_method": "signed8"},
        "block.1.o": {"equalization": "smoothquant"},
        "block.0.o": {"scheme": Scheme.FLOAT, "weight_method": "float"},
        "block.2.q": {"scheme": Scheme.FLOAT, "weight_method": "float"},
        "block.2.k": {"scheme": Scheme.PER_TOKEN},
        "block.2.v": {"scheme": Scheme.PER_TOKEN},
    }
    edited = dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(e, **edits.get(e.label, {})) for e in plan.layers)
    )
    chosen = observed_groups(groups, settings, edited)
    labels = {group.layers[0].label for group in chosen}
    assert "lm_head" in labels and "block.0.o" not in labels
    decisions = {d.group.layers[0].label: d.decision for d in decide_groups(groups, statistics, settings, edited)}
    assert decisions["lm_head"].scheme is Scheme.PER_TOKEN
    assert decisions["block.1.o"].equalization == "smoothquant"
    assert decisions["block.1.q"].equalization == "lae"
    assert decisions["block.2.q"].scheme is Scheme.PER_TOKEN  # of the activation, for k and v
    assert "block.0.o" not in decisions


def test_float_weights_are_planned_as_such(linears: LinearSearch, groups: list[ActivationGroup]) -> None:
    settings = recipe(weights__format="float")
    plan = make_plan(linears.layers, decide_groups(groups, _statistics(groups), settings), settings)
    assert {entry.weight_method for entry in plan.layers} == {"float"}
    assert plan["block.0.q"].scheme is Scheme.STATIC and plan["block.0.q"].is_quantized
    assert not plan["lm_head"].is_quantized


def test_reasons_are_given_for_every_layer(linears: LinearSearch, groups: list[ActivationGroup]) -> None:
    settings = recipe(layers__include=(r"block\.1",), layers__exclude=(r"block\.1\.o",))
    plan = make_plan(linears.layers, decide_groups(groups, _statistics(groups, **PEAKS), settings), settings)
    reasons = {entry.label: entry.reason for entry in plan.layers}
    assert reasons["lm_head"] == "the recipe keeps lm_head float"
    assert reasons["block.0.q"] == "no include pattern matches"
    assert reasons["block.1.o"] == r"excluded by 'block\\.1\\.o'"
    assert reasons["block.1.k"].startswith("range 15.01 between 15 and 150: equalized to ")
