"""The comparison models of the demo are what their names say, and run."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx
import pytest

from tools import baselines


@pytest.mark.parametrize("family", [families.DYNAMO, families.DYNAMO_KV, families.GENAI_FP32])
def test_matmulnbits(family: str, tmp_path: Path) -> None:
    model = families.model("llama-untied", family)
    target = tmp_path / "out" / "model.onnx"
    for _ in range(2):  # a second run replaces the first
        baselines.quantize_matmulnbits(model.path, target, block_size=32)
    nodes = [node for node in onnx.load(target).graph.node if node.op_type == "MatMulNBits"]
    linears = 5 if family.startswith("genai") else 7  # q, k and v packed in one
    assert len(nodes) == linears * families.BLOCKS + 1
    attributes = {attribute.name: attribute.i for attribute in nodes[0].attribute}
    assert (attributes["block_size"], attributes["bits"], attributes["accuracy_level"]) == (32, 4, 4)
    token_ids = model.token_ids()
    noise = model.run(token_ids, target) - model.run(token_ids)
    assert 0 < np.square(noise).mean() < 0.2 * np.square(model.run(token_ids)).mean()
    assert baselines.model_bytes(target) == sum(file.stat().st_size for file in target.parent.iterdir())


@pytest.mark.parametrize("family", [families.DYNAMO, families.DYNAMO_KV])
def test_static_int8(family: str, tmp_path: Path) -> None:
    model = families.model("llama", family)
    target = tmp_path / "model.onnx"
    seen: list[int] = []
    baselines.quantize_static_int8(model.path, target, model.token_ids(batch=3, length=16), seen.append)
    assert sum(seen) == 3
    types = [node.op_type for node in onnx.load(target).graph.node]
    assert types.count("QuantizeLinear") > 7 * families.BLOCKS
    assert np.isfinite(model.run(model.token_ids(), target)).all()
