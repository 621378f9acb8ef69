"""Layers named in a command: the expressions match them, and no others."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from fptq_onnx.analysis.evidence import label_patterns

LABELS = ["lm_head", "other.0", "q", *(f"block.{block}.{role}" for block in range(25) for role in ("q", "qkv", "up"))]


def test_layers_of_one_role_share_an_expression() -> None:
    assert label_patterns(["block.3.q"]) == [r"block\.3\.q$"]
    assert label_patterns(["block.11.q", "lm_head", "block.3.q"]) == [r"block\.(3|11)\.q$", "lm_head$"]
    assert label_patterns([]) == []


@given(st.lists(st.sampled_from(LABELS), unique=True))
def test_they_match_the_named_layers_alone(named: list[str]) -> None:
    patterns = label_patterns(named)
    assert [label for label in LABELS if any(re.match(p, label) for p in patterns)] == [x for x in LABELS if x in named]
