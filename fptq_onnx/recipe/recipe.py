"""Recipes: every choice of a conversion, with its source, as a strict schema that YAML files fill in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError

from fptq_onnx.errors import RecipeError, why_unreadable
from fptq_onnx.quantization.policy import PolicySettings, Scheme
from fptq_onnx.recipe.fields import listing, recipe_error, set_field
from fptq_onnx.recipe.sections import (
    ActivationRecipe,
    CalibrationRecipe,
    EqualizationRecipe,
    FallbackRecipe,
    LayersRecipe,
    RotationRecipe,
    Section,
    VerificationRecipe,
    WeightRecipe,
)

__all__ = ["Recipe"]

_RECIPES = Path(__file__).parent.parent / "recipes"


class Recipe(Section):
    """All choices of one conversion. Unset fields take the values of the FPTQ publication (arXiv 2308.15987)."""

    name: str = "paper"
    """Name in reports."""

    description: str = ""
    """One line on what the recipe is for."""

    activations: ActivationRecipe = ActivationRecipe()
    """How activations become int8."""

    equalization: EqualizationRecipe = EqualizationRecipe()
    """What happens between v0 and v1."""

    rotation: RotationRecipe = RotationRecipe()
    """Rotations before calibration."""

    weights: WeightRecipe = WeightRecipe()
    """How weights become int4."""

    layers: LayersRecipe = LayersRecipe()
    """Which layers take part."""

    calibration: CalibrationRecipe = CalibrationRecipe()
    """How much data is observed."""

    fallback: FallbackRecipe = FallbackRecipe()
    """Which layers leave int4 weights or static activations."""

    verification: VerificationRecipe = VerificationRecipe()
    """When the result is accepted."""

    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file that it was read from; None for recipes of the package and those made in memory."""
        return self._source

    @classmethod
    def names(cls) -> list[str]:
        """The recipes that come with the package."""
        return sorted(path.stem for path in _RECIPES.glob("*.yaml"))

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe of the package by its name, or a YAML file by its path.

        Args:
            name_or_path: "paper", or a path; an argument with a suffix or a directory is taken as a path.
            overrides: Dotted fields and their values, such as {"weights.grid": "signed8"}, applied on top.

        Raises:
            RecipeError: No such recipe, unreadable YAML, or a field that the schema refuses, with its line.
        """
        text_name = str(name_or_path)
        if "/" not in text_name and not Path(text_name).suffix:
            if text_name not in cls.names():
                raise RecipeError(
                    f"recipe {text_name!r}", "there is no such recipe", f"Use {listing(cls.names())} or a YAML file"
                )
            path = _RECIPES / f"{text_name}.yaml"
        else:
            path = Path(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                text_name, why_unreadable(error), "Give a recipe name or the path of a YAML file"
            ) from None
        recipe = cls.from_yaml(text, where=text_name, overrides=overrides)
        recipe._source = path if path.parent != _RECIPES else None
        return recipe

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "recipe", overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Parse YAML text; errors as in `load`."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{where}:{mark.line + 1}" if mark else where
            problem = getattr(error, "problem", None) or "it is not YAML"
            raise RecipeError(place, str(problem), "Correct the YAML") from None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise RecipeError(where, "it is not a mapping of fields", 'Start from a copy of the recipe "paper"')
        for dotted, value in (overrides or {}).items():
            set_field(data, dotted, value)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise recipe_error(cls, error, where, node, set(overrides or {})) from None

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """A copy with dotted fields replaced, such as {"weights.grid": "signed8"}; RecipeError if refused."""
        data = self.model_dump()
        for dotted, value in overrides.items():
            set_field(data, dotted, value)
        try:
            changed = Recipe.model_validate(data)
        except ValidationError as error:
            raise recipe_error(Recipe, error, self.name, None, set(overrides)) from None
        changed._source = self._source
        return changed

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, in plain JSON types, for the report and the model's metadata."""
        return self.model_dump(mode="json")

    @property
    def needs_samples(self) -> bool:
        """Whether a sample of each activation is kept."""
        chooses = self.activations.static_range == "output" or self.equalization.method == "search"
        return chooses or self.equalization.shift or self.fallback.float_layers > 0 or self.fallback.rounds > 0

    def policy(self) -> PolicySettings:
        """The part of the recipe that the activation policy reads."""
        a, e = self.activations, self.equalization
        scheme = None if a.scheme == "policy" else Scheme(a.scheme)
        method = "lae" if e.method == "search" else e.method
        return PolicySettings(a.v0, a.v1, a.range, scheme, method, e.alpha, e.floor, e.scale_bits)
