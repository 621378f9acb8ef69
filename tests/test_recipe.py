import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import fptq_onnx
from fptq_onnx.errors import RecipeError
from fptq_onnx.quantization.policy import PolicySettings, Scheme
from fptq_onnx.recipe import Recipe


def test_paper_is_the_publication():
    recipe = Recipe.load("paper")
    assert recipe.policy() == PolicySettings(15, 150, scheme=None, equalization="lae", scale_bits=8)
    assert (recipe.weights.grid, recipe.weights.group_size, recipe.weights.format) == ("absmax7", 128, "int4")
    assert recipe.layers.lm_head == "float"
    # unset fields of a user's recipe mean the publication
    assert recipe == Recipe(description=recipe.description)


def test_paper_spells_out_every_field():
    text = (Path(fptq_onnx.__file__).parent / "recipes" / "paper.yaml").read_text()

    def keys(value):
        return {key: keys(v) for key, v in value.items()} if isinstance(value, dict) else None

    assert keys(yaml.safe_load(text)) == keys(Recipe.load("paper").resolved())


@pytest.mark.parametrize("name", Recipe.names())
def test_every_packaged_recipe_introduces_itself(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")


def test_every_field_has_a_description():
    def walk(model):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(Recipe)


def test_resolved_restores_the_recipe():
    recipe = Recipe.load("paper", {"weights.grid": "signed8", "layers.exclude": ["block.0"]})
    assert Recipe.model_validate(json.loads(json.dumps(recipe.resolved()))) == recipe
    assert recipe.weights.grid == "signed8"
    assert Recipe().with_overrides({"weights.group_size": 32}).weights.block_size(576) == 32
    assert Recipe().with_overrides({"weights.group_size": "channel"}).weights.block_size(576) == 576


def test_a_file_may_set_little(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nactivations:\n  scheme: per-token\n")
    assert Recipe.load(path).policy().scheme is Scheme.PER_TOKEN
    path.write_text("")
    empty = Recipe.load(str(path))
    assert empty.resolved() == Recipe().resolved()
    assert empty.source == empty.with_overrides({"weights.grid": "signed8"}).source == path
    assert Recipe.load("paper").source is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights:\n  gird: signed8\n", r"mine\.yaml:2 weights\.gird: there is no such field\. Use grid"),
        ("wieghts: {}\n", r"mine\.yaml:1 wieghts: there is no such field\. Use weights"),
        ("name: x\nactivations:\n  v0: wide\n", r"mine\.yaml:3 activations\.v0: .*number.*'wide'"),
        ("activations:\n  v0: 20\n  v1: 10\n", r"mine\.yaml:1 activations: v1 \(10\) is smaller than v0 \(20\)"),
        ("activations:\n  v0: .inf\n", r"mine\.yaml:2 activations\.v0: .*finite"),
        ("weights: {grid: best}\n", r"mine\.yaml:1 weights\.grid: .*'signed8'"),
        ("weights: {group_size: 100}\n", r"weights\.group_size"),
        (
            "layers:\n  exclude:\n    - 'block'\n    - '('\n",
            r"mine\.yaml:2 layers\.exclude: .*not a regular expression",
        ),
        ("layers:\n  exclude:\n    - 'block'\n    - [1]\n", r"mine\.yaml:4 layers\.exclude\.1"),
        ("calibration: 3\n", r"mine\.yaml:1 calibration"),
        ("a: [\n", r"mine\.yaml:\d"),
        ("- 1\n", "not a mapping"),
        ("just text", "not a mapping"),
        ("weights: !!python/object:os.system {}\n", r"mine\.yaml:1"),
    ],
)
def test_mistakes_name_line_field_and_fix(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(text, where="mine.yaml")


def test_unknown_recipes(tmp_path):
    with pytest.raises(RecipeError, match=r"no such recipe\. Use .*paper"):
        Recipe.load("papier")
    with pytest.raises(RecipeError, match=r"absent\.yaml: there is no such file"):
        Recipe.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("dotted", ["weights.gird", "name.x", "weights.group_size"])
def test_bad_overrides(dotted):
    with pytest.raises(RecipeError, match=dotted):
        Recipe().with_overrides({dotted: "nonsense"})
    with pytest.raises(RecipeError, match=dotted):
        Recipe.load("paper", {dotted: "nonsense"})


def test_layer_selection():
    layers = Recipe().with_overrides({"layers.include": ["block"], "layers.exclude": [r"block\.3\.", "/odd"]}).layers
    assert layers.why_left_out("block.2.q", "n", "q") is None
    assert "block" in layers.why_left_out("block.3.q", "n", "q")
    assert "excluded" in layers.why_left_out("block.4.q", "/odd/node", "q")
    assert layers.why_left_out("other.1", "n", "other") == "no include pattern matches"
    assert Recipe().layers.why_left_out("lm_head", "n", "lm_head") == "the recipe keeps lm_head float"
    kept = Recipe().with_overrides({"layers.lm_head": "int4"}).layers
    assert kept.why_left_out("lm_head", "n", "lm_head") is None
