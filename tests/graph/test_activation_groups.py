"""Layers that read one activation share a group, also behind Identity nodes."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
from graph_tools import model_from_text

from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model


def test_groups_of_a_decoder(tiny_llama: families.TinyModel) -> None:
    groups = group_by_activation(find_linears(load_model(tiny_llama.path)).layers)
    first = ["qkv"] if tiny_llama.family.startswith("genai") else ["q", "k", "v"]
    roles = [[str(layer.role) for layer in group.layers] for group in groups]
    assert roles == [first, ["o"], ["gate", "up"], ["down"]] * tiny_llama.blocks + [["lm_head"]]
    for group in groups:
        assert group.k == group.layers[0].k
        assert all(layer.activation is group.activation for layer in group.layers)


def test_identity_is_looked_through(tmp_path: Path) -> None:
    body = """
        h = Relu(x)
        a = MatMul(h, w)
        i = Identity(h)
        j = Identity(i)
        b = MatMul(j, w)
        c = Cast <to = 1> (h)
        d = MatMul(c, w)
        e = Add(a, b)
        y = Add(e, d)"""
    weights = {"w": np.eye(4, dtype=np.float32)}
    model = model_from_text(tmp_path, "(float[2, 4] x) => (float[2, 4] y)", body, weights)
    groups = group_by_activation(find_linears(model).layers)
    assert [(group.activation.name, len(group.layers)) for group in groups] == [("h", 2), ("c", 1)]
    assert groups[0].layers[1].activation.name == "j"


def test_no_layers_no_groups() -> None:
    assert group_by_activation([]) == []
