import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_onnx.errors import RecipeError
from fptq_onnx.quantization.plan import LayerPlan, Plan
from fptq_onnx.quantization.policy import Scheme


def layer(label="block.0.q", **changes):
    fields = {
        "name": f"/{label}/MatMul",
        "label": label,
        "role": label.rsplit(".", 1)[-1],
        "block": 0,
        "k": 576,
        "n": 192,
        "activation": "x",
        "activation_range": 7.5,
        "scheme": Scheme.STATIC,
        "equalization": "none",
        "weight_method": "signed8",
        "group_size": 128,
        "reason": "range 7.5 up to 15: static",
    }
    return LayerPlan(**{**fields, **changes})


PLAN = Plan((layer(), layer("block.0.k"), layer("block.0.o", activation="y", scheme=Scheme.PER_TOKEN)), {"name": "p"})


def edit(change):
    data = json.loads(PLAN.to_json())
    change(data)
    return json.dumps(data)


@given(
    st.sampled_from([Scheme.STATIC, Scheme.PER_TOKEN, Scheme.FLOAT]),
    st.one_of(st.none(), st.floats(0, 1e6)),
    st.text(max_size=20),
    st.one_of(st.none(), st.integers(0, 99)),
)
def test_json_round_trip(scheme, v, reason, block):
    method = "float" if scheme is Scheme.FLOAT else "mse_clip"
    plan = Plan((layer(scheme=scheme, activation_range=v, reason=reason, block=block, weight_method=method),))
    assert Plan.from_json(plan.to_json()) == plan


def test_plans_from_before_there_were_shifts_are_read():
    data = json.loads(PLAN.to_json())
    for entry in data["layers"]:
        assert entry.pop("shift") is False
    assert Plan.from_json(json.dumps(data)) == PLAN


def test_lookup_and_counts(tmp_path):
    assert PLAN["block.0.k"].label == "block.0.k"
    with pytest.raises(KeyError):
        PLAN["block.9.q"]
    assert PLAN.static_share == pytest.approx(2 / 3)
    assert Plan(()).static_share == 0
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert Plan.load(path) == PLAN


def test_an_edit_that_fits_is_accepted():
    def change(data):
        for entry in data["layers"][:2]:
            entry["scheme"], entry["equalization"] = "equalized-static", "lae"

    edited = Plan.from_json(edit(change))
    edited.fit(PLAN)
    assert edited["block.0.q"].scheme is Scheme.EQUALIZED_STATIC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["layers"][2].update(scheme="dynamic"), r"block\.0\.o\.scheme"),
        (lambda d: d["layers"][2].update(shceme="static"), r"block\.0\.o\.shceme"),
        (lambda d: d["layers"][0].pop("k"), r"block\.0\.q\.k"),
        (lambda d: d.update(format=2), "format 2"),
        (lambda d: d["layers"][0].update(scheme="per-token"), "reads the same activation as block.0.q"),
        (lambda d: d["layers"][1].update(alpha=0.3), r"static \(none, alpha 0\.3\) instead of static \(none\)"),
        (lambda d: d["layers"][1].update(shift=True), r"static \(none, shifted\) instead of static \(none\)"),
        (lambda d: d["layers"][2].update(scheme="float", weight_method="float", shift=True), "o.shift"),
        (lambda d: d["layers"][0].update(equalization="lae"), "does not go with scheme static"),
        (lambda d: d["layers"][2].update(scheme="equalized-static"), "none does not go with"),
        (lambda d: d["layers"][2].update(scheme="float"), "signed8 does not go with scheme float"),
        (lambda d: d["layers"][2].update(group_size=0), "not positive"),
        (lambda d: d["layers"][1].update(label="block.0.q"), "listed twice"),
    ],
)
def test_bad_edits_name_the_layer(change, message):
    with pytest.raises(RecipeError, match=message):
        Plan.from_json(edit(change))


def test_one_reader_may_be_left_float():
    edited = Plan.from_json(edit(lambda d: d["layers"][1].update(scheme="float", weight_method="float")))
    assert not edited["block.0.k"].is_quantized and edited["block.0.q"].is_quantized


@pytest.mark.parametrize("text", ["", "[]", "{", '{"layers": 3}', '{"layers": [{}]}', '{"layers": [7]}'])
def test_not_a_plan(text):
    with pytest.raises(RecipeError, match=r"mine\.json"):
        Plan.from_json(text, where="mine.json")


def test_unreadable(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.json: there is no such file"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (PLAN.layers[:2], "no entry for this layer"),
        ((*PLAN.layers, layer("block.7.q", activation="z")), "no such layer"),
        ((replace(PLAN.layers[0], n=64), *PLAN.layers[1:]), r"block\.0\.q\.n.*64.*192"),
        ((replace(PLAN.layers[0], name="other"), *PLAN.layers[1:]), r"block\.0\.q\.name"),
    ],
)
def test_a_plan_of_another_model_is_refused(layers, message):
    with pytest.raises(RecipeError, match=message):
        Plan(layers).fit(PLAN)


def test_the_observed_range_may_differ():
    Plan(tuple(replace(entry, activation_range=9.0) for entry in PLAN.layers)).fit(PLAN)
