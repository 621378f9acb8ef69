"""The rows of the ablation: which recipe each one converts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ENCODER_ROWS", "LANGUAGE_ROWS", "RECIPE_ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Short name, that of its file.
        title: What the table calls it.
        recipe: The packaged recipe it starts from; None for the float model itself.
        changes: Fields set on top.
    """

    name: str
    title: str
    recipe: str | None
    changes: dict[str, Any]


_INT8_TABLE = {"layers.lm_head": "int8", "layers.embedding": "int8"}
_INT4_TABLE = {"layers.lm_head": "int4", "layers.embedding": "int4"}
_INT4_EMBEDDING = {"layers.embedding": "int4"}
_FLOAT_TABLE = {"layers.lm_head": "float", "layers.embedding": "float"}

# Each step keeps the changes of the steps above it.
STEPS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("paper", "FPTQ as published (int4 absmax/7, g128, LAE, 15/150)", {}),
    ("signed8", "+ int4 on -8..7 with signed scales", {"weights.grid": "signed8"}),
    ("weighted-clip", "+ clip search weighed by the inputs", {"weights.grid": "weighted_clip"}),
    ("two-buckets", "+ per token from 15 on instead of equalized up to 150", {"activations.v1": 15}),
    ("rotation", "+ Hadamard rotation of stream and heads", {"rotation.residual": True, "rotation.heads": True}),
    ("output-range", "+ static range absmax or mse by the layers' outputs", {"activations.static_range": "output"}),
    ("integer-scales", "+ integer scales", {"weights.scales": "integer"}),
    ("int8-table", "+ int8 head and embedding, one table", _INT8_TABLE),
    ("gptq", "+ GPTQ in activation order", {"weights.rounding": "gptq"}),
    ("first-token", "+ first token counts 32 times (balanced)", {"weights.first_token_weight": 32}),
)


def _chain() -> list[Row]:
    rows, so_far = [Row("float", "float32", None, {})], dict[str, Any]()
    for name, title, changes in STEPS:
        so_far = so_far | dict(changes)
        rows.append(Row(name, title, "paper", so_far))
    return rows


_BALANCED = _chain()[-1].changes
_GPTQ = next(row for row in _chain() if row.name == "gptq").changes


def _instead(name: str, title: str, changes: Mapping[str, Any]) -> Row:
    """A variant of the chain's step with GPTQ, without what comes after it."""
    return Row(name, title, "paper", _GPTQ | dict(changes))


_PER_TOKEN = {"activations.scheme": "per-token"}
_SEARCH = {"equalization.method": "search"}
_NO_ROTATION = {"rotation.residual": False, "rotation.heads": False}
_ACCURATE = Row(
    "accurate",
    "accurate: every activation per token, groups of 64",
    "paper",
    _BALANCED | _PER_TOKEN | {"weights.group_size": 64},
)
# Variants with GPTQ that leave one thing out: what it is worth with all others there.
_WITHOUT: tuple[Row, ...] = (
    _instead("no-rotation", "GPTQ without rotation", _NO_ROTATION),
    _instead("heads-only", "GPTQ, rotation of the heads alone", {"rotation.residual": False}),
    _instead("natural-order", "GPTQ in natural order", {"weights.order": "natural"}),
    _instead("no-token-cap", "GPTQ, attention sinks not capped", {"weights.token_cap": 0}),
    _instead("no-rotation-no-cap", "GPTQ without rotation and cap", _NO_ROTATION | {"weights.token_cap": 0}),
    _instead("float-weights", "activations only, no GPTQ", {"weights.format": "float"} | _FLOAT_TABLE),
)
# Not equalized: the scales would make the head's weights others than the table's.
_TABLE_ONLY = {"layers.include": ["lm_head"], "activations.v1": 15}
_TABLE_ALONE = Row(
    "int8-table-alone",
    "int8 head and embedding alone, all else float",
    "paper",
    _INT8_TABLE | _TABLE_ONLY,
)
# The table in four bits: with the head, and what the lookup costs by itself.
_INT4_ROWS: tuple[Row, ...] = (
    Row("int4-table", "balanced, int4 head and embedding, one table", "paper", _BALANCED | _INT4_TABLE),
    Row(
        "int4-embedding-alone",
        "int4 embedding, int8 head alone, all else float",
        "paper",
        _INT8_TABLE | _INT4_EMBEDDING | _TABLE_ONLY,
    ),
)
_SEARCHED = _instead("search", "GPTQ, equalizer searched from 15 to 150", _SEARCH | {"activations.v1": 150})

_SHIFT = {"equalization.shift": True}
_EVERYWHERE = _SEARCH | {"activations.v0": 0, "activations.v1": 1e9}
_CORRECTION = {"weights.bias_correction": True}
_CORRECTED = _instead("bias-correction", "GPTQ, bias correction", _CORRECTION)
_SEARCHED_ALL = _instead("search-all", "GPTQ, equalizer searched for all", _EVERYWHERE)
_CLIPPED = next(row for row in _chain() if row.name == "weighted-clip").changes
# Shifted activations: on weights rounded to nearest, under GPTQ, where biases make up for rounding anyhow, and as
# further candidates of the search.
_SHIFTED: tuple[Row, ...] = (
    Row("shift-nearest", "clip search, no GPTQ, shifted where that is free", "paper", _CLIPPED | _SHIFT),
    _instead("shift", "GPTQ, shifted where that is free", _SHIFT),
    _instead("shift-correction", "GPTQ, bias correction, shifted where that is free", _CORRECTION | _SHIFT),
    _instead("shift-search", "GPTQ, equalizer searched for all, shifted ones too", _EVERYWHERE | _SHIFT),
)
_SHIFTED_ACTIVATIONS = _instead(
    "shift-float-weights",
    "activations only, shifted where that is free",
    {"weights.format": "float"} | _FLOAT_TABLE | _SHIFT,
)

LANGUAGE_ROWS: tuple[Row, ...] = (
    *(*_chain(), _ACCURATE, *_WITHOUT, _TABLE_ALONE, *_INT4_ROWS, _SEARCHED),
    *(_CORRECTED, _SEARCHED_ALL, *_SHIFTED, _SHIFTED_ACTIVATIONS),
    Row("shift-accurate", "accurate, shifted where that is free", "paper", _ACCURATE.changes | _SHIFT),
)

ENCODER_ROWS: tuple[Row, ...] = (
    *_chain(),
    _ACCURATE,
    _instead("mse-range", "GPTQ, static ranges of least squared error", {"activations.static_range": "mse"}),
    _SEARCHED,
    _SEARCHED_ALL,
    _CORRECTED,
    *_SHIFTED,
    _instead("asymmetric", "GPTQ, asymmetric static activations", {"activations.symmetric": False}),
)

# The packaged recipes as they are, and what their parts cost.
RECIPE_ROWS: tuple[Row, ...] = (
    Row("float", "float32", None, {}),
    Row("paper", "paper", "paper", {}),
    Row("paper-signed8", "paper, int4 on -8..7", "paper", {"weights.grid": "signed8"}),
    Row("paper-activations", "paper, activations only", "paper", {"weights.format": "float"}),
    Row("paper-per-token", "paper, int4 on -8..7, all per token", "paper", {"weights.grid": "signed8"} | _PER_TOKEN),
    Row("balanced", "balanced", "balanced", {}),
    Row("balanced-activations", "balanced, activations only", "balanced", {"weights.format": "float"} | _FLOAT_TABLE),
    Row("balanced-no-rotation", "balanced without rotation", "balanced", _NO_ROTATION),
    Row("balanced-no-token-cap", "balanced, attention sinks not capped", "balanced", {"weights.token_cap": 0}),
    Row("accurate", "accurate", "accurate", {}),
    Row("int8-table", "int8 head and embedding alone, one table", "paper", _INT8_TABLE | _TABLE_ONLY),
    Row("int8-tables", "the same, head equalized: two tables", "paper", _INT8_TABLE | {"layers.include": ["lm_head"]}),
)
