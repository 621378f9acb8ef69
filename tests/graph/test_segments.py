"""Cuts cover the graph once, carry exactly what later segments read, and refuse what cannot be cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import families
import numpy as np
import pytest
from graph_tools import model_from_text

from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.segments import extract_segment, find_segments, segments_between


def test_segments_of_every_family(tiny_model: families.TinyModel) -> None:
    model = load_model(tiny_model.path)
    linears = find_linears(model)
    cut = find_segments(model, linears)
    assert cut.refused is None and cut.description == f"{len(cut)} segments"
    assert [segment.label for segment in cut] == ["embedding", "block 0", "block 1", "block 2", "head"]
    nodes = [node for segment in cut for node in segment.nodes]
    assert set(nodes) == set(model.graph) and len(nodes) == len(set(nodes))
    for layer in linears.layers:
        label = cut.segments[cut.of(layer)].label
        assert label == ("head" if layer.block is None else f"block {layer.block}"), layer.label
    made: set[str | None] = set()
    for before, segment in itertools.pairwise([None, *cut]):
        assert {value.name for value in segment.inputs} <= made
        assert bool(segment.inputs) == (before is not None)
        made |= {value.name for value in segment.outputs}


def test_weights_of_a_segment_are_its_own(tiny_model: families.TinyModel) -> None:
    model = load_model(tiny_model.path)
    linears = find_linears(model)
    cut = find_segments(model, linears)
    for segment in cut:
        part = extract_segment(model, segment, [])
        for layer in linears.layers:
            inside = layer.weight.name in part.graph.initializers
            tied = layer.role == "lm_head" and segment.label == "embedding"
            assert inside == (cut.of(layer) == segment.index) or tied, (segment.label, layer.label)


def test_the_same_cut_by_names(tiny_model: families.TinyModel) -> None:
    first, second = load_model(tiny_model.path), load_model(tiny_model.path)
    cut = find_segments(first, find_linears(first))
    values = {value.name: value for node in second.graph for value in node.outputs}
    again = segments_between(second, [values[name] for name in cut.boundaries], tiny_model.blocks)
    assert [[node.name for node in segment.nodes] for segment in again] == [
        [node.name for node in segment.nodes] for segment in cut
    ]


def test_without_attention(tmp_path: Path) -> None:
    model = model_from_text(
        tmp_path,
        "(float[1, 3, 8] x) => (float[1, 3, 8] y)",
        "h = MatMul(x, w)\n y = Add(h, x)",
        {"w": np.eye(8, dtype=np.float32)},
    )
    cut = find_segments(model, find_linears(model))
    assert len(cut) == 1 and cut.segments[0].label == "model"
    assert cut.description.startswith("not cut into blocks: no attention was found")


@pytest.mark.parametrize(
    ("h", "reason"),
    [
        ("If (yes) <then_branch = a () => (float[1, 3, 8] t) { t = Identity(h1) },"
         " else_branch = b () => (float[1, 3, 8] e) { e = Relu(h1) }>", "the If node"),
        ("Relu(h1)", None),
    ],
)  # fmt: skip
def test_subgraphs_are_not_cut(tmp_path: Path, h: str, reason: str | None) -> None:
    attend = """
        k{0} = Transpose <perm = [0, 2, 1]> (h{0})
        q{0} = MatMul(h{0}, w)
        s{0} = MatMul(q{0}, k{0})
        p{0} = Softmax(s{0})
        a{0} = MatMul(p{0}, h{0})
        o{0} = MatMul(a{0}, w)
        h{1} = Add(h{0}, o{0})"""
    body = f"h0 = Relu(x)\n {attend.format(0, 1)}\n h2 = {h}\n y = Identity(h2)"
    weights = {"w": np.eye(8, dtype=np.float32)} | ({"yes": np.array(True)} if reason else {})
    model = model_from_text(tmp_path, "(float[1, 3, 8] x) => (float[1, 3, 8] y)", body, weights)
    cut = find_segments(model, find_linears(model))
    assert (cut.refused is None) == (reason is None)
    assert reason is None or reason in str(cut.refused)
