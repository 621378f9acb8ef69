"""The plan: one decision per linear layer, as data that a user can read, edit and feed back in."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fptq_onnx.errors import RecipeError, why_unreadable
from fptq_onnx.quantization.int4 import Grid
from fptq_onnx.quantization.policy import EqualizationMethod, Scheme

__all__ = ["LayerPlan", "Plan", "WeightMethod"]

WeightMethod = Literal["float", "int8"] | Grid
_FORMAT = 1
_STRICT = ConfigDict(extra="forbid")
# What describes the model rather than a choice; editing it would silently change nothing or break the conversion.
_FIXED = ("name", "role", "block", "k", "n", "activation")


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one linear layer.

    Attributes:
        name: Node name in the graph.
        label: Name that is the same in every export of a model, such as "block.3.q".
        role: Role of the layer ("q", "gate_up", "lm_head", ...).
        block: Index of its decoder or encoder block, None outside.
        k: Input features.
        n: Output features.
        activation: Name of the value it reads.
        activation_range: Range v of that value in calibration, before equalization; None if it was not observed.
        scheme: How the activation becomes int8. Editable; the same for all layers that read one activation.
        equalization: "none", "lae" or "smoothquant". Editable, likewise shared; goes with scheme "equalized-static".
        weight_method: "float", "int8" or an int4 grid. Editable; "float" leaves the layer's weight as it is.
        group_size: Rows of an int4 weight that share a scale. Editable.
        reason: Why, in words.
        alpha: SmoothQuant's exponent where another than the recipe's was found. Editable, likewise shared.
        shift: Whether each channel loses the middle of its range first. Editable where the model can take it for free,
            likewise shared; goes with every scheme but "float".
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    label: str
    role: str
    block: int | None
    k: int
    n: int
    activation: str
    activation_range: float | None
    scheme: Scheme
    equalization: EqualizationMethod
    weight_method: WeightMethod
    group_size: int
    reason: str
    alpha: float | None = None
    shift: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether the conversion changes this layer at all."""
        return self.scheme is not Scheme.FLOAT or self.weight_method != "float"


@dataclass(frozen=True)
class Plan:
    """All decisions of one conversion, in execution order.

    Attributes:
        layers: One entry per linear layer.
        recipe: The resolved recipe that they came from.
        format: Version of this file's layout.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    layers: tuple[LayerPlan, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    format: int = _FORMAT

    def __getitem__(self, label: str) -> LayerPlan:
        """The layer called ``label``; KeyError if there is none."""
        for layer in self.layers:
            if layer.label == label:
                return layer
        raise KeyError(label)

    @property
    def static_share(self) -> float:
        """Share of the layers with int8 activations whose scale is static; 0 if there is none."""
        integer = [layer.scheme.is_static for layer in self.layers if layer.scheme is not Scheme.FLOAT]
        return sum(integer) / len(integer) if integer else 0.0

    def to_json(self) -> str:
        """The plan as indented JSON with a final newline; `from_json` restores an equal plan."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "plan") -> Plan:
        """Read a plan and check that it is consistent in itself.

        Args:
            text: JSON as written by `to_json`.
            where: File name for error messages.

        Raises:
            RecipeError: Not JSON, an unknown or missing field, a value that is not allowed, or layers that read one
                activation and disagree.
        """
        try:
            plan = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = _describe(first["loc"], text)
            raise RecipeError(
                f"{where} {place}".rstrip(), first["msg"][0].lower() + first["msg"][1:], "Correct this entry"
            ) from None
        if plan.format != _FORMAT:
            raise RecipeError(where, f"plan format {plan.format} is not {_FORMAT}", "Write a new plan with --dry-run")
        plan.check(where)
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; RecipeError as in `from_json` or if it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(str(path), why_unreadable(error), "Give the path of a plan file") from None
        return cls.from_json(text, where=str(path))

    def check(self, where: str = "plan") -> None:
        """Raise RecipeError if two entries contradict each other or one contradicts itself."""
        labels: set[str] = set()
        readers: dict[str, list[LayerPlan]] = defaultdict(list)
        for layer in self.layers:
            if layer.label in labels:
                raise RecipeError(f"{where} {layer.label}", "it is listed twice", "Remove one of the entries")
            labels.add(layer.label)
            _check_layer(layer, where)
            if layer.scheme is not Scheme.FLOAT:
                readers[layer.activation].append(layer)
        for layers in readers.values():
            first = layers[0]
            for other in layers[1:]:
                if _choice(other) != _choice(first):
                    raise RecipeError(
                        f"{where} {other.label}",
                        f"it reads the same activation as {first.label} but asks for {_shared(other)} "
                        f"instead of {_shared(first)}",
                        f"Give both the same scheme and equalization, or set the scheme of one to {Scheme.FLOAT}",
                    )

    def fit(self, fresh: Plan, where: str = "plan") -> None:
        """Check that this (edited) plan belongs to the model that ``fresh`` was made from.

        Raises:
            RecipeError: A layer is missing or unknown, or a field that describes the model was changed.
        """
        mine = {layer.label: layer for layer in self.layers}
        theirs = {layer.label: layer for layer in fresh.layers}
        for label in mine:
            if label not in theirs:
                raise RecipeError(f"{where} {label}", "the model has no such layer", "Remove the entry")
        for label, expected in theirs.items():
            if label not in mine:
                raise RecipeError(
                    f"{where} {label}", "the plan has no entry for this layer", f"Add it, with scheme {Scheme.FLOAT}"
                )
            for name in _FIXED:
                found, wanted = getattr(mine[label], name), getattr(expected, name)
                if found != wanted:
                    raise RecipeError(
                        f"{where} {label}.{name}", f"it is {found!r} but the model has {wanted!r}", "Restore the value"
                    )


def _choice(layer: LayerPlan) -> tuple[Any, ...]:
    """What the layers that read one activation have to agree on."""
    return layer.scheme, layer.equalization, layer.alpha, layer.shift


def _shared(layer: LayerPlan) -> str:
    alpha = "" if layer.alpha is None else f", alpha {layer.alpha:g}"
    return f"{layer.scheme} ({layer.equalization}{alpha}{', shifted' if layer.shift else ''})"


def _check_layer(layer: LayerPlan, where: str) -> None:
    place = f"{where} {layer.label}"
    if layer.group_size < 1:
        raise RecipeError(f"{place}.group_size", f"{layer.group_size} is not positive", "Use 32, 64, 128 or k")
    if (layer.scheme is Scheme.EQUALIZED_STATIC) != (layer.equalization != "none"):
        raise RecipeError(
            f"{place}.equalization",
            f"{layer.equalization} does not go with scheme {layer.scheme}",
            f"Use a method with {Scheme.EQUALIZED_STATIC} and none with the other schemes",
        )
    if layer.scheme is Scheme.FLOAT and layer.shift:
        raise RecipeError(f"{place}.shift", f"it does not go with scheme {Scheme.FLOAT}", "Set it to false")
    if layer.scheme is Scheme.FLOAT and layer.weight_method != "float":
        raise RecipeError(
            f"{place}.weight_method",
            f"{layer.weight_method} does not go with scheme {Scheme.FLOAT}",
            "Use float for both or for neither scheme",
        )


def _describe(loc: tuple[int | str, ...], text: str) -> str:
    """Turn ("layers", 3, "scheme") into "block.0.o.scheme" where the entry still has a label."""
    if len(loc) >= 2 and loc[0] == "layers" and isinstance(loc[1], int):
        try:
            label = str(json.loads(text)["layers"][loc[1]]["label"])
        except (KeyError, IndexError, TypeError):
            label = f"layers[{loc[1]}]"
        return ".".join([label, *map(str, loc[2:])])
    return ".".join(map(str, loc))
