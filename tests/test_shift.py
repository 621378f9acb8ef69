"""Activations off zero, from the recipe to the file: shifted where that is free, the same function, less error."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import families
import onnx_ir as ir
import pytest
from conversions import LENGTH, move_off_zero, recipe

import fptq_onnx
from fptq_onnx.errors import RecipeError, StoppedError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.generate import generate
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.quantization.plan import Plan
from fptq_onnx.recipe import Recipe

FAMILY = families.DYNAMO_KV


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 as it is, but the channels of its inner activations lie far off zero, on both sides of it."""
    model = load_model(families.model("gpt2", FAMILY).path)
    assert move_off_zero(model, 9) == 3 * families.BLOCKS
    path = tmp_path_factory.mktemp("planted") / "model.onnx"
    ir.save(model, path)
    return path


def _recipe(**overrides: object) -> Recipe:
    return recipe(**{"equalization__shift": True} | overrides)


def test_a_cache_of_shifted_values_gives_the_same_text(planted: Path) -> None:
    """Also where prompts of several lengths run as one batch and the cache holds places that nobody may attend to."""
    tiny = families.model("gpt2", FAMILY)
    prompts = [tiny.token_ids(batch=1, length=length)[0] for length in (3, 11)]
    before, after = (
        generate(open_language_model(path, threads=1), prompts, max_new_tokens=8).token_ids
        for path in (tiny.path, planted)
    )
    assert after == before


@pytest.mark.parametrize("scheme", ["static", "per-token"])
def test_shifting_makes_up_for_channels_off_zero(planted: Path, tmp_path: Path, scheme: str) -> None:
    """Better than GPTQ and bias correction, which take the mean of the rounding errors out, but not their size."""
    divergence = {}
    for shift in (False, True):
        chosen = _recipe(
            equalization__shift=shift,
            activations__scheme=scheme,
            weights__rounding="gptq",
            weights__bias_correction=True,
        )
        report = fptq_onnx.convert(planted, tmp_path / f"{shift}.onnx", recipe=chosen, verify_tokens=2 * LENGTH)
        assert report.verification is not None
        divergence[shift] = report.verification.kl_mean
        shifted = {layer.role for layer in report.layers if layer.equalization.startswith("shift: bias ")}
        assert shifted == ({"qkv", "o", "fc1"} if shift else set())
        assert all(("shift kept: output error" in layer.reason) == (layer.role in shifted) for layer in report.layers)
    assert divergence[True] < 0.4 * divergence[False], divergence
    # nothing was added: the same nodes, with other constants
    shapes = [
        [(node.op_type, len(node.inputs)) for node in load_model(tmp_path / f"{shift}.onnx").graph]
        for shift in (False, True)
    ]
    assert shapes[0] == shapes[1]


def test_a_search_takes_shifted_candidates_and_its_plan_repeats_it(planted: Path, tmp_path: Path) -> None:
    chosen = _recipe(equalization__method="search", activations__v0=0, activations__v1=1e9)
    for name in ("searched", "planned"):
        fptq_onnx.convert(planted, tmp_path / f"{name}.onnx", recipe=chosen, verify_tokens=0, dry_run=name == "planned")
    plan = Plan.load(tmp_path / "planned.plan.json")
    taken = [layer for layer in plan.layers if layer.shift]
    assert {layer.role for layer in taken} == {"qkv", "o", "fc1"}
    assert all("shifted" in layer.reason for layer in taken)
    fptq_onnx.convert(planted, tmp_path / "again.onnx", recipe=chosen, plan=plan, verify_tokens=0)
    assert _digest(tmp_path / "again.onnx") == _digest(tmp_path / "searched.onnx")


def test_a_plan_is_edited(planted: Path, tmp_path: Path) -> None:
    fptq_onnx.convert(planted, tmp_path / "m.onnx", recipe=_recipe(), verify_tokens=0, dry_run=True)
    plan = Plan.load(tmp_path / "m.plan.json")

    def edited(label: str, shift: bool) -> Plan:
        layers = (dataclasses.replace(e, shift=shift) if e.label == label else e for e in plan.layers)
        return dataclasses.replace(plan, layers=tuple(layers))

    report = fptq_onnx.convert(
        planted, tmp_path / "m.onnx", recipe=recipe(), plan=edited("block.1.fc1", False), verify_tokens=0
    )
    places = {layer.label: layer.equalization for layer in report.layers}
    assert places["block.1.fc1"] == "none" and places["block.0.fc1"].startswith("shift")
    with pytest.raises(RecipeError, match=r"block\.1\.fc2\.shift: it would cost time: "):
        fptq_onnx.convert(planted, tmp_path / "m.onnx", recipe=recipe(), plan=edited("block.1.fc2", True))


def test_a_stopped_conversion_goes_on_with_its_shifts(planted: Path, tmp_path: Path) -> None:
    chosen = _recipe(
        equalization__method="search", activations__v0=0, weights__rounding="gptq", activations__static_range="mse"
    )
    fptq_onnx.convert(planted, tmp_path / "whole.onnx", recipe=chosen, verify_tokens=0)
    stops = 0
    while True:
        try:
            fptq_onnx.convert(
                planted,
                tmp_path / "parts.onnx",
                recipe=chosen,
                verify_tokens=0,
                work_dir=tmp_path / "work",
                stop=lambda: True,
            )
            break
        except StoppedError:
            stops += 1
    assert stops > 3
    assert _digest(tmp_path / "parts.onnx") == _digest(tmp_path / "whole.onnx")


def test_models_without_a_place_are_converted_as_before(tmp_path: Path) -> None:
    """RMSNorm has no bias: the option changes nothing, and the reason is in the plan's schemes alone."""
    source = families.model("llama", families.DYNAMO).path
    for shift in (False, True):
        fptq_onnx.convert(
            source, tmp_path / f"{shift}.onnx", recipe=_recipe(equalization__shift=shift), verify_tokens=0
        )
    graphs = [load_model(tmp_path / f"{shift}.onnx").graph for shift in (False, True)]
    constants = [{name: value.const_value.numpy().tobytes() for name, value in g.initializers.items()} for g in graphs]
    assert constants[0] == constants[1]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
