"""The whole conversion on tiny models: plans, reports, verification, data, and every way to fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conversions import LENGTH, WINDOWS, Converted, constants, converted, recipe, relative_error
from onnxruntime.quantization import CalibrationDataReader

import fptq_onnx
from fptq_onnx.convert import default_output
from fptq_onnx.errors import (
    CalibrationError,
    FptqError,
    ModelError,
    NothingQuantizedError,
    RecipeError,
    VerificationError,
)
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.quantization.metrics import snr_db
from fptq_onnx.quantization.plan import Plan
from fptq_onnx.quantization.policy import Scheme
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report

# Scheme by activation in the paper's policy: what families.OUTLIERS was made for.
SCHEMES = {
    "block.0.down": "per-token",
    "block.1.qkv": "equalized-static",
    "block.1.gate_up": "equalized-static",
    "block.2.down": "equalized-static",
}


def _llama() -> families.TinyModel:
    return families.model("llama", families.DYNAMO)


def _convert(output: Path, **arguments: Any) -> Report:
    """Convert the tiny Llama with little data, unless told otherwise."""
    overrides = {name: arguments.pop(name) for name in list(arguments) if "__" in name}
    arguments = {"recipe": recipe(**overrides), "verify_tokens": 0} | arguments
    return fptq_onnx.convert(arguments.pop("model", _llama().path), output, **arguments)


def _activation(label: str) -> str:
    """Label of the activation that a layer reads: packed projections and single ones have the same."""
    *block, role = label.split(".")
    shared = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    return ".".join([*block, shared.get(role, role)])


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# One model, four graph families.


@pytest.mark.parametrize("family", families.LLAMA_FAMILIES)
def test_families_get_the_same_plan(family: str) -> None:
    layers = converted("llama", family).report.layers
    ranges = {_activation(layer.label): layer.range for layer in converted("llama", families.DYNAMO).report.layers}
    blocks = [layer for layer in layers if layer.role != "lm_head"]
    assert {_activation(layer.label) for layer in layers} == ranges.keys()
    for layer in blocks:
        activation = _activation(layer.label)
        assert layer.scheme == SCHEMES.get(activation, "static"), layer.label
        assert layer.range == pytest.approx(ranges[activation], rel=5e-3), layer.label
        assert layer.weight_method == "absmax7 g32"
        kind = {"per-token": "none", "static": "none"}.get(layer.scheme, "linear" if layer.role == "down" else "norm")
        assert layer.equalization.split(":")[0] == kind
    (lm_head,) = (layer for layer in layers if layer.role == "lm_head")
    assert (lm_head.scheme, lm_head.reason) == ("float", "the recipe keeps lm_head float")


def test_families_compute_the_same() -> None:
    token_ids = _llama().token_ids()
    exact = _llama().run(token_ids)
    logits = {family: converted("llama", family).run(token_ids) for family in families.LLAMA_FAMILIES}
    noise = snr_db(exact, logits[families.DYNAMO])
    for family, found in logits.items():
        # Where sums are rounded differently, single activations take the next of 255 steps; float16 moves most.
        limit = noise + 3 if family == families.GENAI_FP16 else noise + 20
        assert snr_db(logits[families.DYNAMO], found) > limit, family
        assert snr_db(exact, found) == pytest.approx(noise, abs=1), family


def test_packed_projection_holds_the_integers_of_its_parts() -> None:
    """Groups of 32 input channels per column: packing q, k and v changes no scale."""
    single, packed = (converted("llama", family) for family in (families.DYNAMO, families.GENAI_FP32))
    for block in range(families.BLOCKS):
        parts = [_integers(single, f"block.{block}.{role}") for role in "qkv"]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), _integers(packed, f"block.{block}.qkv"))


def _integers(result: Converted, label: str) -> np.ndarray:
    (layer,) = (layer for layer in result.report.layers if layer.label == label)
    return constants(load_model(result.path))[f"{layer.name}.weight_int4"].astype(np.int8)


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("llama", families.DYNAMO_FP16),
        ("qwen2", families.DYNAMO),
        ("qwen2", families.GENAI_FP16),
        ("gpt2", families.DYNAMO_KV),
        ("bert", families.DYNAMO),
    ],
)
def test_other_architectures(architecture: str, family: str) -> None:
    """Biases, Gemm, post-norm encoders, half precision: everything but the head is quantized and close."""
    result = converted(architecture, family)
    assert [layer.label for layer in result.report.layers if layer.scheme == "float"] == ["lm_head"]
    token_ids = result.tiny.token_ids()
    before, after = result.tiny.run(token_ids), result.run(token_ids)
    assert 4 < snr_db(before, after) < 40
    assert result.report.bytes_after < 0.65 * result.report.bytes_before


# The report.


def test_report_has_the_documented_keys() -> None:
    report = json.loads(converted("llama", families.DYNAMO).report.to_json())
    assert set(report) >= {
        *("model", "output", "format", "calibration", "data_free", "recipe", "layers", "skipped", "bytes_before"),
        *("bytes_after", "verification", "seconds", "peak_memory_bytes", "versions"),
    }
    documented = ["name", "role", "k", "n", "range", "scheme", "equalization", "weight_method", "snr_db", "reason"]
    for layer in report["layers"]:
        assert set(layer) == {*documented, "label", "bytes_before", "bytes_after"}
    assert report["recipe"]["calibration"] == {**report["recipe"]["calibration"], "seed": 0, "windows": WINDOWS}
    assert report["recipe"]["weights"]["group_size"] == 32
    assert {"load", "calibrate", "plan", "equalize", "quantize", "save", "verify"} <= set(report["seconds"])
    assert report["peak_memory_bytes"] > 50e6
    assert {"python", "onnxruntime", "onnx", "numpy"} <= set(report["versions"])
    assert {skipped["reason"] for skipped in report["skipped"]} == {"both operands are activations"}
    assert len(report["skipped"]) == 2 * families.BLOCKS


@pytest.mark.parametrize("output_format", ["custom", "qdq", "matmulnbits"])
def test_report_counts_bytes(output_format: Any) -> None:
    result = converted("llama", families.DYNAMO, output_format)
    model, arrays = load_model(result.path), constants(load_model(result.tiny.path))
    for layer in result.report.layers:
        groups = math.ceil(layer.k / 32)
        rows = groups * 32 if output_format == "matmulnbits" else layer.k  # that operator fills up the last group
        quantized = rows * layer.n // 2 + 4 * groups * layer.n
        assert layer.bytes_before == 4 * layer.k * layer.n
        assert layer.bytes_after == (layer.bytes_before if layer.scheme == "float" else quantized), layer.label
    assert result.report.bytes_before == sum(array.nbytes for array in arrays.values())
    stored = [value.const_value.nbytes for value in model.graph.initializers.values()]
    assert result.report.bytes_after == sum(stored)
    assert sum(stored) < result.path.stat().st_size


def test_report_lies_beside_the_model_and_recipe_in_it() -> None:
    result = converted("llama", families.DYNAMO)
    assert _files(result.path.parent) == {"model.fptq.onnx", "model.fptq.json"}
    written = json.loads(result.path.with_name("model.fptq.json").read_text())
    assert written == json.loads(result.report.to_json())
    stored = json.loads(load_model(result.path).metadata_props["fptq.recipe"])
    assert stored == result.report.recipe == recipe().resolved()


def test_verification_and_layer_noise_are_true() -> None:
    """The figures again, from the two files alone, on the tokens that data-free calibration draws."""
    result = converted("llama", families.DYNAMO)
    check = result.report.verification
    token_ids = np.random.default_rng(0).integers(0, families.VOCABULARY, (WINDOWS, LENGTH), dtype=np.int64)
    before, after = result.tiny.run(token_ids).astype(np.float64), result.run(token_ids).astype(np.float64)
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (before, after))
    assert check.tokens == WINDOWS * LENGTH
    assert check.kl_mean == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(), rel=1e-4)
    assert check.top1_agreement == (before.argmax(-1) == after.argmax(-1)).mean()
    assert check.output_snr_db == pytest.approx(snr_db(before, after), abs=1e-3)
    assert check.max_kl is None and check.passed
    by_label = {layer.label: layer for layer in result.report.layers}
    first = slice(0, 1)  # layers are compared on the first window
    assert by_label["lm_head"].snr_db == pytest.approx(snr_db(before[first], after[first]), abs=1e-2)
    assert by_label["block.0.q"].snr_db > by_label["block.2.q"].snr_db  # noise adds up


def test_layers_before_the_first_quantized_one_have_no_noise(tmp_path: Path) -> None:
    report = _convert(tmp_path / "out.onnx", exclude=[r"block\.0\."], verify_tokens=LENGTH)
    exact = [layer.label for layer in report.layers if layer.snr_db == math.inf]
    assert exact == [f"block.0.{role}" for role in ("q", "k", "v", "o", "gate", "up", "down")]
    written = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert [layer["label"] for layer in written["layers"] if layer["snr_db"] is None] == exact


# Recipes.


def test_thresholds(tmp_path: Path) -> None:
    report = _convert(tmp_path / "a.onnx", activations__v0=0.0, activations__v1=0.0)
    assert report.schemes() == {"per-token": 21, "float": 1}
    report = _convert(tmp_path / "b.onnx", activations__v0=1e4, activations__v1=1e4)
    assert report.schemes() == {"static": 21, "float": 1}


@pytest.mark.parametrize("scheme", ["static", "equalized-static", "per-token"])
def test_one_scheme_everywhere(tmp_path: Path, scheme: str) -> None:
    report = _convert(tmp_path / "out.onnx", activations__scheme=scheme, verify_tokens=LENGTH)
    schemes = [layer.scheme for layer in report.layers if layer.role != "lm_head"]
    assert schemes.count(scheme) >= 15  # an equalization that does not help is not applied
    assert report.verification.output_snr_db > 0


def test_float_weights(tmp_path: Path) -> None:
    """Activations only: the loss is smaller and the weights stay."""
    both = converted("llama", families.DYNAMO).report
    report = _convert(tmp_path / "out.onnx", weights__format="float", verify_tokens=2 * LENGTH)
    assert report.verification.kl_mean < both.verification.kl_mean / 2
    assert [layer.scheme for layer in report.layers] == [layer.scheme for layer in both.layers]
    assert {layer.weight_method for layer in report.layers} == {"float"}
    assert all(layer.bytes_after == layer.bytes_before for layer in report.layers)


@pytest.mark.parametrize("name", ["balanced", "accurate"])
def test_recipes_of_the_package(tmp_path: Path, name: str) -> None:
    """Rotation and GPTQ end to end, also by function bodies; both lose less than the paper's recipe."""
    small = {"calibration.windows": 2 * WINDOWS, "calibration.length": LENGTH, "weights.group_size": 32}
    settings = Recipe.load(name, small)
    report = _convert(tmp_path / "out.onnx", recipe=settings, verify_tokens=2 * LENGTH)
    assert report.recipe["name"] == name
    paper = converted("llama", families.DYNAMO)
    assert report.verification.kl_mean < paper.report.verification.kl_mean
    result = dataclasses.replace(paper, path=tmp_path / "out.onnx")
    token_ids = _llama().token_ids()
    assert relative_error(result.run(token_ids, library=False), result.run(token_ids)) < 1e-4


def test_equalizers_are_searched_by_output_error(tmp_path: Path) -> None:
    """For every activation; the plan that comes out converts to the same bytes."""
    changes = {"equalization__method": "search", "activations__v0": 0, "activations__v1": 1e9}
    changes["activations__static_range"] = "output"
    report = _convert(tmp_path / "out.onnx", **changes)
    reasons = [layer.reason for layer in report.layers if layer.role != "lm_head"]
    assert all("best static error" in reason and "per-token" in reason for reason in reasons)
    assert report.schemes()["static"] + report.schemes()["equalized-static"] > 10
    _convert(tmp_path / "plan.onnx", dry_run=True, **changes)
    _convert(tmp_path / "again.onnx", plan=tmp_path / "plan.plan.json", **changes)
    found, again = (constants(load_model(tmp_path / name)) for name in ("out.onnx", "again.onnx"))
    assert found.keys() == again.keys()
    assert all(np.array_equal(array, again[name]) for name, array in found.items())


def test_float_layers_are_those_of_largest_error(tmp_path: Path) -> None:
    report = _convert(tmp_path / "out.onnx", fallback__float_layers=3)
    kept = [layer for layer in report.layers if layer.scheme == "float" and layer.role != "lm_head"]
    assert len(kept) == 3 and all("largest output error" in layer.reason for layer in kept)


def test_falling_back_meets_the_budget(tmp_path: Path) -> None:
    """Down the chain until the divergence is allowed; without it the same limit is missed."""
    usual = converted("llama", families.DYNAMO).report.verification.kl_mean
    limit = usual / 3
    with pytest.raises(VerificationError):
        _convert(tmp_path / "missed.onnx", verify_tokens=2 * LENGTH, max_kl=limit)
    report = _convert(tmp_path / "out.onnx", verify_tokens=2 * LENGTH, max_kl=limit, fallback__rounds=4)
    assert report.verification.passed and 0 < report.verification.kl_mean <= limit
    changed = [layer for layer in report.layers if "fallen back" in layer.reason]
    assert {layer.weight_method for layer in changed} & {"int8", "float"}
    assert any(layer.weight_method.startswith("absmax7") for layer in report.layers)


@pytest.mark.parametrize("grid", ["signed8", "mse_clip", "weighted_clip"])
def test_grids(tmp_path: Path, grid: str) -> None:
    report = _convert(tmp_path / "out.onnx", weights__grid=grid, verify_tokens=2 * LENGTH)
    assert report.layers[0].weight_method.startswith(f"{grid} g32")
    assert report.layers[0].snr_db > converted("llama", families.DYNAMO).report.layers[0].snr_db


def test_integer_scales(tmp_path: Path) -> None:
    _convert(tmp_path / "out.onnx", weights__scales="integer")
    model = load_model(tmp_path / "out.onnx")
    products = [node for node in model.graph if node.op_type == "W4A8MatMul"]
    assert len(products) == 21
    for node in products:
        assert node.attributes["scale_max_multiple"].as_int() == 15
        scale = np.abs(node.inputs[4].const_value.numpy().astype(np.float64))
        multiples = scale / scale.max(axis=0) * np.arange(1, 16)[:, None, None]  # [top multiple, group, column]
        whole = np.abs(multiples - np.rint(multiples)).max(axis=1) < 1e-5
        assert whole.any(axis=0).all()


@pytest.mark.parametrize("group", [64, "channel"])
def test_group_sizes(tmp_path: Path, group: Any) -> None:
    report = _convert(tmp_path / "out.onnx", weights__group_size=group)
    nodes = {node.name: node for node in load_model(tmp_path / "out.onnx").graph}
    for layer in report.layers[:-1]:
        block = layer.k if group == "channel" else min(group, layer.k)
        assert nodes[layer.name].attributes["block_size"].as_int() == block
        assert tuple(nodes[layer.name].inputs[4].shape) == (math.ceil(layer.k / block), layer.n)


def test_asymmetric_activations(tmp_path: Path) -> None:
    _convert(tmp_path / "out.onnx", activations__symmetric=False, activations__scheme="static")
    nodes = [node for node in load_model(tmp_path / "out.onnx").graph if node.op_type == "QuantizeLinear"]
    points = {int(node.inputs[2].const_value.numpy()) for node in nodes}
    assert len(nodes) == 12 and len(points) > 1


@pytest.mark.parametrize("method", ["mse", "percentile"])
@pytest.mark.parametrize("once", [False, True], ids=["file", "generator"])
def test_clipped_ranges(tmp_path: Path, method: str, once: bool) -> None:
    """Scales shrink, also where the equalized activation has to be observed anew, from data that come only once."""
    tokens = np.random.default_rng(0).integers(0, families.VOCABULARY, (WINDOWS, LENGTH), dtype=np.int64)
    np.savez(tmp_path / "data.npz", input_ids=tokens)
    data = ({"input_ids": row[None]} for row in tokens) if once else tmp_path / "data.npz"
    _convert(
        tmp_path / "out.onnx",
        calibration=data,
        activations__static_range=method,
        activations__percentile=99.0,
    )
    scales = [_activation_scales(path) for path in (tmp_path / "out.onnx", converted("llama", families.DYNAMO).path)]
    assert scales[0].keys() == scales[1].keys() and len(scales[0]) == 11
    assert all(scales[0][name] <= scales[1][name] for name in scales[0])
    if method == "percentile":
        assert all(scales[0][name] < scales[1][name] for name in scales[0])


def _activation_scales(path: Path) -> dict[str, float]:
    nodes = [node for node in load_model(path).graph if node.op_type == "QuantizeLinear"]
    return {node.name: float(node.inputs[1].const_value.numpy()) for node in nodes}


def test_exclude_adds_to_the_recipe(tmp_path: Path) -> None:
    report = _convert(tmp_path / "out.onnx", exclude=[r"block\.1\.", "node_linear_2$"], layers__exclude=[".*down"])
    left = {layer.label: layer.reason for layer in report.layers if layer.scheme == "float"}
    assert left.pop("lm_head") == "the recipe keeps lm_head float"
    assert left.pop("block.0.v") == "excluded by 'node_linear_2$'"
    assert left.pop("block.0.down") == left.pop("block.2.down") == "excluded by '.*down'"
    assert set(left) == {f"block.1.{role}" for role in ("q", "k", "v", "o", "gate", "up", "down")}
    with pytest.raises(RecipeError, match="regular expression"):
        _convert(tmp_path / "bad.onnx", exclude=["("])


def test_excluded_layer_of_an_equalized_activation_stays_right(tmp_path: Path) -> None:
    """q stays float while k and v are equalized with the norm that feeds all three."""
    report = _convert(tmp_path / "out.onnx", exclude=[r"block\.1\.q", "block.[02]"], verify_tokens=LENGTH)
    by_label = {layer.label: layer for layer in report.layers}
    assert by_label["block.1.k"].scheme == "equalized-static"
    assert by_label["block.1.q"].scheme == "float" and by_label["block.1.q"].snr_db > 90
    assert 10 < by_label["block.1.k"].snr_db < 40


# Plans.


def test_dry_run_writes_the_plan_only(tmp_path: Path) -> None:
    report = _convert(tmp_path / "out.onnx", dry_run=True)
    assert _files(tmp_path) == {"out.plan.json"}
    assert report.output is None and report.bytes_after is None and report.verification is None
    plan = Plan.load(tmp_path / "out.plan.json")
    assert [(entry.label, str(entry.scheme)) for entry in plan.layers] == [(r.label, r.scheme) for r in report.layers]
    assert plan.recipe == recipe().resolved()


def test_plan_carried_out_unchanged_gives_the_same_bytes(tmp_path: Path) -> None:
    _convert(tmp_path / "out.onnx", dry_run=True)
    _convert(tmp_path / "out.onnx", plan=tmp_path / "out.plan.json")
    assert _digest(tmp_path / "out.onnx") == _digest(converted("llama", families.DYNAMO).path)


def test_edited_plan_is_obeyed(tmp_path: Path) -> None:
    edits: dict[str, dict[str, Any]] = {
        "block.0.o": {"scheme": Scheme.PER_TOKEN},
        "block.0.down": {"scheme": Scheme.EQUALIZED_STATIC, "equalization": "smoothquant"},
        "block.1.o": {"scheme": Scheme.FLOAT, "weight_method": "float"},
        "block.2.o": {"weight_method": "weighted_clip", "group_size": 16},
        "block.2.down": {"scheme": Scheme.STATIC, "equalization": "none", "weight_method": "float"},
        "lm_head": {"scheme": Scheme.STATIC, "weight_method": "signed8", "group_size": 72},
    }
    plan = _edited(tmp_path, edits)
    report = _convert(tmp_path / "out.onnx", plan=plan)

    by_label = {layer.label: layer for layer in report.layers}
    for entry in plan.layers:
        assert by_label[entry.label].scheme == entry.scheme
    assert by_label["block.0.down"].equalization.startswith("linear: ")
    assert by_label["block.2.o"].weight_method == "weighted_clip g16"
    nodes = {node.name: node for node in load_model(tmp_path / "out.onnx").graph}
    kinds = {label: nodes[layer.name].op_type for label, layer in by_label.items()}
    assert [label for label, kind in kinds.items() if kind == "MatMul"] == ["block.1.o", "block.2.down"]
    assert nodes[by_label["block.2.o"].name].attributes["block_size"].as_int() == 16
    assert nodes[by_label["block.0.o"].name].inputs[0].producer().op_type == "DynamicQuantizePerToken"
    assert nodes[by_label["block.0.down"].name].inputs[0].producer().op_type == "QuantizeLinear"
    assert nodes[by_label["lm_head"].name].attributes["block_size"].as_int() == 72


def _edited(tmp_path: Path, edits: dict[str, dict[str, Any]]) -> Plan:
    """The tiny Llama's plan with fields of some layers replaced, once through a file."""
    _convert(tmp_path / "fresh.onnx", dry_run=True)
    plan = Plan.load(tmp_path / "fresh.plan.json")
    layers = tuple(dataclasses.replace(entry, **edits.get(entry.label, {})) for entry in plan.layers)
    (tmp_path / "fresh.plan.json").write_text(dataclasses.replace(plan, layers=layers).to_json())
    return Plan.load(tmp_path / "fresh.plan.json")


def test_plan_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the model runs."""
    plan = tmp_path / "other.plan.json"
    _convert(tmp_path / "other.onnx", model=families.model("llama", families.GENAI_FP32).path, dry_run=True)
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    with pytest.raises(RecipeError, match=r"plan block\.0\.qkv: the model has no such layer"):
        _convert(tmp_path / "out.onnx", plan=plan)
    with pytest.raises(RecipeError, match=r"missing\.json: there is no such file"):
        _convert(tmp_path / "out.onnx", plan=tmp_path / "missing.json")
    assert _files(tmp_path) == {"other.plan.json"}


# Calibration data.


def test_data_free_says_so() -> None:
    report = converted("llama", families.DYNAMO).report
    assert report.data_free
    assert report.calibration == f"{WINDOWS} windows of {LENGTH} random tokens (data-free, seed 0)"


class _Reader(CalibrationDataReader):
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def test_every_kind_of_data_gives_the_same_model(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, families.VOCABULARY, (WINDOWS, LENGTH), dtype=np.int64)
    np.savez(tmp_path / "data.npz", input_ids=tokens)
    batches = [{"input_ids": row[None]} for row in tokens]
    descriptions = {
        "data.npz": tmp_path / "data.npz",
        "_Reader": _Reader(batches),
        "2 batches": batches,
        "given by the caller": iter(batches),
    }
    for description, data in descriptions.items():
        report = _convert(tmp_path / "out.onnx", calibration=data, verify_tokens=LENGTH)
        assert description in report.calibration and not report.data_free
        assert _digest(tmp_path / "out.onnx") == _digest(converted("llama", families.DYNAMO).path), description
        assert report.verification.tokens == LENGTH


def test_text(tmp_path: Path) -> None:
    """The tokenizer beside the model is found; another can be given."""
    text = tmp_path / "text.txt"
    text.write_text("The old mill stood by the river, and nobody had opened its doors for thirty years. " * 8)
    report = _convert(tmp_path / "out.onnx", calibration=text)
    assert report.calibration.endswith(f"windows of {LENGTH} tokens of text.txt") and not report.data_free

    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.onnx").write_bytes(_llama().path.read_bytes())
    with pytest.raises(CalibrationError, match=r"text\.txt: is text, and there is no tokenizer"):
        _convert(tmp_path / "none.onnx", model=alone / "model.onnx", calibration=text)
    again = _convert(tmp_path / "b.onnx", model=alone / "model.onnx", calibration=text, tokenizer=_llama().tokenizer)
    assert [layer.range for layer in again.layers] == [layer.range for layer in report.layers]


def test_seed_decides(tmp_path: Path) -> None:
    """The same input and seed give the same bytes, another seed others."""
    first = _digest(converted("llama", families.DYNAMO).path)
    _convert(tmp_path / "out.onnx")
    assert _digest(tmp_path / "out.onnx") == first
    _convert(tmp_path / "out.onnx", calibration__seed=1)
    assert _digest(tmp_path / "out.onnx") != first


def test_leading_tokens_are_left_out(tmp_path: Path) -> None:
    """Statistics of the later positions only; a window with no later one has none."""
    everything = converted("llama", families.DYNAMO).report
    report = _convert(tmp_path / "out.onnx", activations__leading_tokens=12)
    ranges = [(a.range, b.range) for a, b in zip(report.layers, everything.layers, strict=True) if a.range is not None]
    assert all(fewer <= whole for fewer, whole in ranges) and any(fewer < whole for fewer, whole in ranges)


# Acceptance and failure.


def test_the_first_token_counts_more_in_the_second_moments(tmp_path: Path) -> None:
    """A token that starts every sequence ends up with less error if it counts a thousand times."""
    settings = {"weights__grid": "weighted_clip", "weights__rounding": "gptq", "activations__scheme": "per-token"}
    tokens = np.random.default_rng(0).integers(0, families.VOCABULARY, (8, LENGTH), dtype=np.int64)
    tokens[:, 0] = 5
    first, errors = np.array([[5]]), []
    for weight in (1, 1000):
        data = [{"input_ids": row[None]} for row in tokens]
        report = _convert(tmp_path / "out.onnx", calibration=data, weights__first_token_weight=weight, **settings)
        result = Converted(_llama(), tmp_path / "out.onnx", report)
        errors.append(relative_error(result.run(first), _llama().run(first)))
    assert errors[1] < 0.8 * errors[0]


def test_max_kl(tmp_path: Path) -> None:
    """A missed threshold keeps the result and its report."""
    with pytest.raises(VerificationError, match=r"out\.onnx: mean KL \d\.\d+ is over the allowed 0\.001") as caught:
        _convert(tmp_path / "out.onnx", verify_tokens=LENGTH, max_kl=0.001)
    assert _files(tmp_path) == {"out.onnx", "out.json"}
    written = json.loads((tmp_path / "out.json").read_text())["verification"]
    assert written["passed"] is False and written["max_kl"] == 0.001
    assert caught.value.report.verification.kl_mean == written["kl_mean"] > 0.001
    passed = _convert(tmp_path / "out.onnx", verify_tokens=LENGTH, verification__max_kl=50.0)
    assert passed.verification.passed and passed.verification.max_kl == 50


def test_threads_of_every_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the verification too; their number changes nothing in the result."""
    threads = []

    def opening(model: object, options: onnxruntime.SessionOptions, **arguments: Any) -> onnxruntime.InferenceSession:
        threads.append(options.intra_op_num_threads)
        return session(model, options, **arguments)

    session = onnxruntime.InferenceSession
    monkeypatch.setattr("onnxruntime.InferenceSession", opening)
    _convert(tmp_path / "out.onnx", verify_tokens=LENGTH, threads=1)
    assert len(threads) > 4 and set(threads) == {1}
    assert _digest(tmp_path / "out.onnx") == _digest(converted("llama", families.DYNAMO).path)


def test_leading_tokens_that_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no token of the data counts: all are among the leading tokens"):
        _convert(tmp_path / "out.onnx", activations__leading_tokens=LENGTH)
    assert _files(tmp_path) == set()


def test_max_kl_is_never_ignored(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="without verification there is no KL"):
        _convert(tmp_path / "out.onnx", verify_tokens=0, max_kl=1.0)
    with pytest.raises(RecipeError, match=r"max_kl: -0\.1 is no divergence"):
        _convert(tmp_path / "out.onnx", verify_tokens=LENGTH, max_kl=-0.1)
    with pytest.raises(RecipeError, match=r"fallback\.rounds: there is no max_kl to fall back for"):
        _convert(tmp_path / "out.onnx", verify_tokens=LENGTH, fallback__rounds=2)
    assert _files(tmp_path) == set()
    classifier = families.model("bert-classifier", families.DYNAMO).path
    with pytest.raises(VerificationError, match="there are no logits whose KL"):
        _convert(tmp_path / "out.onnx", model=classifier, verify_tokens=LENGTH, max_kl=1.0)


def test_classifier_has_no_token_distribution() -> None:
    check = converted("bert-classifier", families.DYNAMO).report.verification
    assert check.kl_mean is None and check.top1_agreement is None
    assert check.tokens == WINDOWS * LENGTH and math.isfinite(check.output_snr_db)


def test_nothing_quantized(tmp_path: Path) -> None:
    with pytest.raises(NothingQuantizedError, match=r"excluded by '\.\*' \(21\); the recipe keeps lm_head float \(1\)"):
        _convert(tmp_path / "out.onnx", exclude=[".*"])
    with pytest.raises(NothingQuantizedError, match="everywhere"):
        _convert(tmp_path / "out.onnx", activations__scheme="float")
    with pytest.raises(NothingQuantizedError, match="it is already quantized"):
        _convert(tmp_path / "out.onnx", model=converted("gpt2", families.DYNAMO, layers__lm_head="int4").path)
    assert _files(tmp_path) == set()


def test_input_is_never_touched(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(_llama().path.read_bytes())
    (tmp_path / "link.onnx").symlink_to(source)
    for output in (source, tmp_path / "link.onnx"):
        with pytest.raises(ModelError, match="this is the file the model is read from"):
            _convert(output, model=source)
    assert _files(tmp_path) == {"model.onnx", "link.onnx"}
    report = _convert(None, model=source)
    assert Path(report.output) == default_output(source) == tmp_path / "model.fptq.onnx"
    assert _files(tmp_path) == {"model.onnx", "link.onnx", "model.fptq.onnx", "model.fptq.json"}
    assert _digest(source) == _digest(_llama().path)


def test_external_data(tmp_path: Path) -> None:
    """A model in two files gives a model in two files, and its own stay as they are."""
    folder = tmp_path / "in"
    folder.mkdir()
    ir.save(load_model(_llama().path), folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=64)
    before = {path.name: _digest(path) for path in folder.iterdir()}
    _convert(folder / "out.onnx", model=folder / "model.onnx")
    assert _files(folder) == {*before, "out.onnx", "out.onnx.data", "out.json"}
    assert {name: _digest(folder / name) for name in before} == before
    token_ids = _llama().token_ids()
    external = dataclasses.replace(converted("llama", families.DYNAMO), path=folder / "out.onnx")
    assert relative_error(external.run(token_ids), converted("llama", families.DYNAMO).run(token_ids)) == 0


def _with_nan(tmp_path: Path) -> Path:
    """A Llama whose lm_head, which no later activation shows, holds a NaN."""
    model = load_model(families.model("llama-untied", families.DYNAMO).path)
    layer = find_linears(model).by_label()["lm_head"]
    array = layer.weight.const_value.numpy().copy()
    array.flat[5] = np.nan
    layer.weight.const_value = ir.tensor(array, name=layer.weight.name)
    ir.save(model, tmp_path / "nan.onnx")
    return tmp_path / "nan.onnx"


def test_failures_leave_nothing_behind(tmp_path: Path) -> None:
    source = _with_nan(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"weight of lm_head \(node_linear_21\): it holds NaN or Inf"):
        _convert(folder / "out.onnx", model=source, layers__lm_head="int4")
    bad_ids = [{"input_ids": np.full((1, 4), families.VOCABULARY, np.int64)}]
    with pytest.raises(CalibrationError, match="calibration batch 1"):
        _convert(folder / "out.onnx", calibration=bad_ids)
    with pytest.raises(CalibrationError, match="hold no batch"):
        _convert(folder / "out.onnx", calibration=[])
    plan = _edited(tmp_path, {"block.2.o": {"group_size": 24}})
    with pytest.raises(RecipeError, match="MatMulNBits needs a block size that is a power of two >= 16, not 24"):
        _convert(folder / "out.onnx", output_format="matmulnbits", plan=plan)
    assert _files(folder) == set()


@pytest.mark.parametrize("dry_run", [False, True])
def test_missing_folder(tmp_path: Path, dry_run: bool) -> None:
    with pytest.raises(ModelError, match=r"out\.onnx: its folder does not exist\. Create the folder\."):
        _convert(tmp_path / "nowhere" / "out.onnx", dry_run=dry_run)


def test_bad_inputs(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    for model, message in ((tmp_path / "missing.onnx", "no such file"), (tmp_path / "broken.onnx", "protobuf")):
        with pytest.raises(FptqError, match=message):
            _convert(tmp_path / "out.onnx", model=model)
    with pytest.raises(RecipeError, match="there is no such recipe"):
        _convert(tmp_path / "out.onnx", recipe="unknown")
    with pytest.raises(RecipeError, match="format 'tflite': it is unknown"):
        _convert(tmp_path / "out.onnx", output_format="tflite")
    assert _files(tmp_path) == {"broken.onnx"}
