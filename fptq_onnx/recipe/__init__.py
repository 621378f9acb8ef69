"""Recipes: every choice of a conversion, with its source, as a strict schema that YAML files fill in."""

from fptq_onnx.recipe.recipe import Recipe
from fptq_onnx.recipe.sections import (
    ActivationRecipe,
    CalibrationRecipe,
    EqualizationRecipe,
    FallbackRecipe,
    LayersRecipe,
    RotationRecipe,
    VerificationRecipe,
    WeightRecipe,
)

__all__ = [
    "ActivationRecipe",
    "CalibrationRecipe",
    "EqualizationRecipe",
    "FallbackRecipe",
    "LayersRecipe",
    "Recipe",
    "RotationRecipe",
    "VerificationRecipe",
    "WeightRecipe",
]
