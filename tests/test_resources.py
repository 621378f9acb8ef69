"""What a conversion will take: sizes, budgets, and an estimate that grows with what it should grow with."""

from __future__ import annotations

import dataclasses

import families
import onnx_ir as ir
import pytest

from fptq_onnx.errors import RecipeError
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.segments import find_segments, whole
from fptq_onnx.recipe import Recipe
from fptq_onnx.resources import Budget, Estimate, available_memory, estimate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("8GiB", 8 << 30), ("8G", 8 << 30), ("0.5 gb", 1 << 29), ("3MB", 3 << 20), ("64k", 1 << 16)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size == Budget.of(text).bytes


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "8X", "G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match=r"it is not a size\. Write it like 8GiB"):
        parse_size(text)


def test_budget_of_this_machine() -> None:
    assert 1 << 28 < Budget.of(None).bytes < available_memory() * 1.5
    assert Budget.of(1000).share == 250


def _estimate(tokens: int = 1000, model: ir.Model | None = None, cut: bool = True, **overrides: object) -> Estimate:
    model = model or load_model(families.model("llama", families.DYNAMO).path)
    linears = find_linears(model)
    segments = find_segments(model, linears) if cut else whole(model, "no reason")
    recipe = Recipe.load("paper", {name.replace("__", "."): value for name, value in overrides.items()})
    return estimate(model, segments, linears.layers, recipe, tokens)


def test_what_an_estimate_depends_on() -> None:
    plain, gptq = _estimate(), _estimate(weights__rounding="gptq")
    assert gptq.segment_bytes > plain.segment_bytes and gptq.seconds > plain.seconds
    assert _estimate(2000).state_bytes == 2 * plain.state_bytes > 0
    assert _estimate(weights__format="float").result_bytes == 0 < plain.result_bytes
    uncut = _estimate(cut=False)
    assert uncut.segment_bytes > plain.segment_bytes and uncut.state_bytes == 0
    layers = find_linears(load_model(families.model("llama", families.DYNAMO).path)).layers
    elements = sum(layer.k * layer.n for layer in layers if layer.block is not None)
    assert 0.5 * elements < plain.result_bytes < 0.7 * elements
    assert plain.model_bytes > 4 * elements and plain.whole_bytes > 2 * plain.model_bytes * 0.9


def test_what_goes_to_disk_and_what_is_said() -> None:
    found = dataclasses.replace(_estimate(), result_bytes=3 << 30, state_bytes=1 << 30, whole_bytes=20 << 30)
    large, small = Budget(32 << 30), Budget(8 << 30)
    assert not found.on_disk(large) and found.on_disk(small)
    assert not found.by_blocks(large) and found.by_blocks(small)
    told = found.describe(small, on_disk=True, verified=True)
    assert told.startswith(
        "estimate: 5 segments, peak memory 0.4 GiB, hidden states 1.0 GiB and results 3.0 GiB on disk"
    )
    assert "MORE than the 1 MiB of --max-memory" in found.describe(Budget(1 << 20), on_disk=True, verified=False)
    assert found.peak(large, on_disk=False, verified=True) > 23 << 30
    assert 4 << 30 < found.peak(large, on_disk=False, verified=False) < 5 << 30
    assert "not cut into blocks: no reason" in _estimate(cut=False).describe(large, on_disk=False, verified=False)
