"""The ablation's rows are recipes that exist, each one technique more, and its table shows what a record holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import ablation
import pytest
from ablation_rows import ENCODER_ROWS, LANGUAGE_ROWS, RECIPE_ROWS, STEPS, Row
from make_tables import draw

from fptq_onnx.recipe import Recipe

EVERY = [*LANGUAGE_ROWS, *ENCODER_ROWS, *RECIPE_ROWS]


@pytest.mark.parametrize("row", EVERY, ids=lambda row: row.name)
def test_every_row_is_a_recipe(row: Row) -> None:
    if row.recipe is not None:
        recipe = Recipe.load(row.recipe, row.changes)
        assert recipe != Recipe.load(row.recipe) or not row.changes


def test_each_step_adds_one_technique_to_the_last_one() -> None:
    for rows in (LANGUAGE_ROWS, ENCODER_ROWS):
        chain = rows[1 : 1 + len(STEPS)]
        for before, after in itertools.pairwise(chain):
            assert before.changes.items() - after.changes.items() <= {
                (key, value) for key, value in before.changes.items() if key in dict(STEPS[chain.index(after)][2])
            }
            assert after.changes != before.changes
        assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize(("name", "row"), [("balanced", "first-token"), ("accurate", "accurate")])
def test_the_packaged_recipes_are_rows(name: str, row: str) -> None:
    """No technique is on by default without its row."""

    def choices(recipe: Recipe) -> dict[str, object]:
        found = recipe.resolved()
        for section in ("name", "description", "calibration", "verification"):
            del found[section]
        if recipe.activations.scheme == "per-token":  # what only static activations read
            del found["equalization"]
            for field in ("v0", "v1", "static_range"):
                del found["activations"][field]
        return found

    (wanted,) = (r for r in LANGUAGE_ROWS if r.name == row)
    assert choices(Recipe.load(name)) == choices(Recipe.load("paper", wanted.changes))


def test_figures_of_another_recipe_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the row says the same and the packaged recipe has changed; not where it gained a field."""
    row = next(row for row in RECIPE_ROWS if row.name == "balanced")
    fields = ablation._resolved(row)
    assert fields["weights.rounding"] == "gptq"
    for stored, kept in (
        (fields, True),
        ({name: fields[name] for name in list(fields)[:-3]}, True),
        (fields | {"weights.rounding": "nearest"}, False),
        (fields | {"weights.dropped": 1}, False),
    ):
        figures = {"changes": row.changes, "perplexity": 40.0, "resolved": stored}
        (tmp_path / "row.json").write_text(json.dumps(figures))
        assert (ablation._load(tmp_path / "row.json", row) is not None) == kept
        assert ("measure it again" in capsys.readouterr().err) != kept
    assert ablation._load(tmp_path / "row.json", Row("balanced", "", "balanced", {"weights.grid": "signed8"})) is None


def test_the_table() -> None:
    protocol = {"calibration_windows": 8, "window": 512, "brown_windows": 6, "speech_windows": 4}
    rows = [
        {"title": "float32", "perplexity": 40.114, "megabytes": 540.0},
        {"title": "+ GPTQ", "perplexity": 45.0, "static_share": 0.876, "megabytes": 90.2, "kl_mean": None},
    ]
    record = {
        "kind": "ablation-smollm2",
        "created": "2026-11-25T22:00:00+00:00",
        "file": "x.json",
        "versions": {"onnxruntime": "1.31.1"},
        "protocol": protocol,
        "rows": rows,
    }
    table = draw("ablation-smollm2", [record])
    assert "6 held-out windows" in table and "records/x.json" in table
    lines = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0]] == ["", "", "Brown", "static", "MB", ""]
    assert [cell.strip() for cell in lines[3]] == ["", "+ GPTQ", "45.00", "88%", "90", ""]
    with pytest.raises(KeyError, match="no record of kind"):
        draw("ablation-minilm", [record])
