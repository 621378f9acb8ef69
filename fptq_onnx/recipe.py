"""Recipes: every choice of a conversion, with its source, as a strict schema that YAML files fill in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fptq_onnx.errors import RecipeError
from fptq_onnx.quantization.gptq import Order
from fptq_onnx.quantization.int4 import MAX_MULTIPLE, Grid
from fptq_onnx.quantization.policy import EqualizationMethod, PolicySettings, Scheme
from fptq_onnx.quantization.static_range import RangeMethod

__all__ = [
    "ActivationRecipe",
    "CalibrationRecipe",
    "EqualizationRecipe",
    "Recipe",
    "RotationRecipe",
    "VerificationRecipe",
    "WeightRecipe",
]

_RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ActivationRecipe(_Section):
    """How activations become int8."""

    scheme: Literal["policy", "static", "equalized-static", "per-token", "float"] = "policy"
    """"policy" chooses per activation by its range (FPTQ). The others apply one scheme to every
    activation, for comparison: "static" is plain per-tensor int8, "equalized-static" equalizes everything,
    "float" leaves activations alone."""

    v0: float = Field(default=15.0, ge=0)
    """Range up to which an activation is quantized per tensor as it is (FPTQ)."""

    v1: float = Field(default=150.0, ge=0)
    """Range from which on an activation is quantized per token; between v0 and v1 it is equalized first (FPTQ)."""

    range: Literal["absmax", "span"] = "absmax"
    """What v0 and v1 are compared with: max |X|, or max X - min X. FPTQ's text says "range" and its figures show max
    |X|."""

    static_range: RangeMethod = "absmax"
    """Clip range of static activations: everything observed, the percentile below, or the range of least squared
    error over the histogram (TensorRT's and onnxruntime's calibrators have the same three families)."""

    percentile: float = Field(default=99.99, gt=50, le=100)
    """Per cent of the values that static_range "percentile" keeps inside."""

    leading_tokens: int = Field(default=0, ge=0)
    """Positions at the start of each calibration sequence that are left out of the statistics. The first tokens of a
    language model carry attention-sink activations hundreds of times larger than the rest (arXiv 2402.17762)."""

    symmetric: bool = True
    """Zero point 128 for every static activation (FPTQ). False fits scale and zero point to the observed range."""

    @model_validator(mode="after")
    def _ordered(self) -> ActivationRecipe:
        if self.v1 < self.v0:
            raise ValueError(f"v1 ({self.v1:g}) is smaller than v0 ({self.v0:g})")
        return self


class EqualizationRecipe(_Section):
    """How the middle bucket of the policy is evened out before static quantization."""

    method: EqualizationMethod = "lae"
    """"lae": s = m / log2(2 + m) with m the channel's max |X| (FPTQ). "smoothquant": s = m^alpha /
    max|W|^(1 - alpha) (arXiv 2211.10438). "none": the middle bucket is quantized per token instead."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """SmoothQuant's migration strength (arXiv 2211.10438)."""

    floor: float = Field(default=1e-2, ge=0, le=1)
    """Smallest scale as a fraction of the median scale, so that channels silent in calibration are not amplified
    without bound."""


class RotationRecipe(_Section):
    """Orthogonal changes of coordinates that spread outlier channels, folded into the weights before calibration.

    A model whose architecture does not allow one is converted without it; the report says why.
    """

    residual: bool = False
    """Rotate the residual stream of an RMSNorm decoder (QuaRot, arXiv 2404.00456; SpinQuant's R1, arXiv 2405.16406).
    Embedding and head stay as they are: two float MatMuls of hidden x hidden turn the stream there and back."""

    heads: bool = False
    """Rotate the value heads and undo it in the output projection (SpinQuant's R2). Changes what a key-value cache
    holds, not what the model computes."""


class WeightRecipe(_Section):
    """How weights become int4."""

    format: Literal["int4", "float"] = "int4"
    """"float" keeps all weights: only activations are quantized, which separates the two losses."""

    group_size: Literal[32, 64, 128, "channel"] = 128
    """Consecutive input channels that share a scale; "channel" is one scale per output channel. FPTQ uses 128."""

    grid: Grid = "absmax7"
    """"absmax7": scale absmax/7, integers -7..7 (FPTQ). "signed8": the value of largest magnitude becomes -8, the
    scale may be negative (llama.cpp's Q4_0). "mse_clip": the clip range of least squared weight error.
    "weighted_clip": of least error weighed by the mean square of each input channel (llama.cpp's imatrix, AWQ)."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """"gptq" rounds the weights of a layer one row at a time and moves each row's error onto the rows still to come, by
    the second moments of the layer's inputs (arXiv 2210.17323). It is kept only where held-out calibration batches
    agree that it errs less than rounding to nearest."""

    damping: float = Field(default=0.05, gt=0, le=1)
    """GPTQ: fraction of the mean of the Hessian's diagonal that is added to the diagonal."""

    order: Order = "activation"
    """GPTQ: "activation" rounds the input channels of largest second moment first, with scales of the original weight;
    "natural" goes through the channels as they lie and fits each group's scale to what is left then."""

    token_cap: float = Field(default=16.0, ge=0)
    """Tokens whose largest magnitude is over this multiple of the median token's are scaled down to it in the second
    moments, so that attention sinks do not decide alone; 0 counts all tokens fully. Equalized activations need none."""

    scales: Literal["float", "integer"] = "float"
    """"integer": the scales of a column are base * i with |i| in 1..15, so that kernels can accumulate all of K in one
    int32 (QoQ's two-level scales, arXiv 2405.04532)."""

    def block_size(self, k: int) -> int:
        """Rows per scale for a weight of ``k`` rows."""
        return k if self.group_size == "channel" else self.group_size

    @property
    def needs_moments(self) -> bool:
        """Whether quantizing a weight takes the second moments of its inputs."""
        return self.format == "int4" and (self.rounding == "gptq" or self.grid == "weighted_clip")

    @property
    def scale_max_multiple(self) -> int:
        """The attribute of W4A8MatMul: 15 for integer scales, else 0."""
        return MAX_MULTIPLE if self.scales == "integer" else 0


class LayersRecipe(_Section):
    """Which linear layers are quantized."""

    include: tuple[str, ...] = (".*",)
    """Regular expressions; a layer is a candidate if one of them matches its label ("block.3.q") or node name from the
    start."""

    exclude: tuple[str, ...] = ()
    """Regular expressions of layers that stay float although included."""

    lm_head: Literal["float", "int4"] = "float"
    """The output projection. FPTQ, like most W4A8 work, quantizes the decoder blocks only."""

    @field_validator("include", "exclude")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return patterns

    def why_left_out(self, label: str, name: str, role: str) -> str | None:
        """Why a layer stays float, or None if it is to be quantized."""

        def match(patterns: tuple[str, ...]) -> str | None:
            return next((p for p in patterns if re.match(p, label) or re.match(p, name)), None)

        if role == "lm_head" and self.lm_head == "float":
            return "the recipe keeps lm_head float"
        if match(self.include) is None:
            return "no include pattern matches"
        excluded = match(self.exclude)
        return None if excluded is None else f"excluded by {excluded!r}"


class CalibrationRecipe(_Section):
    """How much data is observed."""

    windows: int = Field(default=32, ge=1)
    """Sequences of calibration text or random tokens."""

    length: int = Field(default=512, ge=1)
    """Tokens per sequence; shortened to what the model accepts."""

    moments_gib: float = Field(default=2.0, gt=0)
    """Memory for second moments in GiB. Activations that do not fit together are observed in further passes."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random: which windows of the text, random tokens, random signs."""


class VerificationRecipe(_Section):
    """When the converted model is accepted."""

    max_kl: float | None = Field(default=None, gt=0)
    """Largest mean KL divergence per token, in nats, of the converted from the float model; None reports it only."""


class Recipe(_Section):
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

    verification: VerificationRecipe = VerificationRecipe()
    """When the result is accepted."""

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
                    f"recipe {text_name!r}", "there is no such recipe", f"Use {_listing(cls.names())} or a YAML file"
                )
            path = _RECIPES / f"{text_name}.yaml"
        else:
            path = Path(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = f"it cannot be read ({error})"
            raise RecipeError(text_name, reason, "Give a recipe name or the path of a YAML file") from None
        return cls.from_yaml(text, where=text_name, overrides=overrides)

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
            _set(data, dotted, value)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _recipe_error(error, where, node, set(overrides or {})) from None

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """A copy with dotted fields replaced, such as {"weights.grid": "signed8"}; RecipeError if refused."""
        data = self.model_dump()
        for dotted, value in overrides.items():
            _set(data, dotted, value)
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            raise _recipe_error(error, self.name, None, set(overrides)) from None

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, in plain JSON types, for the report and the model's metadata."""
        return self.model_dump(mode="json")

    def policy(self) -> PolicySettings:
        """The part of the recipe that the activation policy reads."""
        a, e = self.activations, self.equalization
        scheme = None if a.scheme == "policy" else Scheme(a.scheme)
        return PolicySettings(a.v0, a.v1, a.range, scheme, e.method, e.alpha, e.floor)


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(dotted, f"{parent} is not a section", "Name a field such as weights.grid")
        data = child
    data[last] = value


def _recipe_error(error: ValidationError, where: str, node: yaml.Node | None, overridden: set[str]) -> RecipeError:
    """One line from pydantic's first complaint: file, line, field, what is wrong and what would be right."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    line = None if dotted in overridden else _line(node, path)
    place = f"{where}:{line} {dotted}" if line else f"{where} {dotted}"
    if first["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        return RecipeError(place, "there is no such field", f"Use {close[0] if close else _listing(known)}")
    message = first["msg"].removeprefix("Value error, ")
    shown = f" (it is {first['input']!r})" if isinstance(first["input"], str | int | float | bool | None) else ""
    return RecipeError(place, message[0].lower() + message[1:] + shown, "Correct the value")


def _fields(path: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def _line(node: yaml.Node | None, path: list[str]) -> int | None:
    """1-based line of the deepest part of ``path`` that the file contains."""
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
    return line


def _listing(names: list[str]) -> str:
    return ", ".join(names)
