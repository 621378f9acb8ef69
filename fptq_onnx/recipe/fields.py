"""Dotted fields of recipes and the errors about them."""

from __future__ import annotations

import difflib
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fptq_onnx.errors import RecipeError

__all__ = ["listing", "recipe_error", "set_field"]


def set_field(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `data["a"]["b"]` for the dotted field "a.b"; RecipeError if "a" is no section."""
    *parents, last = dotted.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(dotted, f"{parent} is not a section", "Name a field such as weights.grid")
        data = child
    data[last] = value


def recipe_error(
    schema: type[BaseModel], error: ValidationError, where: str, node: yaml.Node | None, overridden: set[str]
) -> RecipeError:
    """One line from pydantic's first complaint: file, line, field, what is wrong and what would be right."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    line = None if dotted in overridden else _line(node, path)
    place = f"{where}:{line} {dotted}" if line else f"{where} {dotted}"
    if first["type"] == "extra_forbidden":
        known = _fields(schema, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        return RecipeError(place, "there is no such field", f"Use {close[0] if close else listing(known)}")
    message = first["msg"].removeprefix("Value error, ")
    shown = f" (it is {first['input']!r})" if isinstance(first["input"], str | int | float | bool | None) else ""
    return RecipeError(place, message[0].lower() + message[1:] + shown, "Correct the value")


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
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


def listing(names: list[str]) -> str:
    """Names for the end of an error: "a, b, c"."""
    return ", ".join(names)
