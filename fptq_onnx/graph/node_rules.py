"""Checks of single nodes against the schema of their operator, so that graph analysis may rely on it."""

from __future__ import annotations

__all__ = ["check_nodes", "misfit"]

import pathlib
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from fptq_onnx.errors import ModelError

# onnxruntime's own operators in the ONNX domain, the same in every opset.
_RUNTIME_OPS = frozenset({"SimplifiedLayerNormalization"})


def check_nodes(model: ir.Model, file: pathlib.Path) -> None:
    """Check every node of the ONNX domain, those of subgraphs and functions included.

    Operators of other domains are left to onnxruntime, which knows them.

    Raises:
        ModelError: A node is none of its operator: unknown, wrong number of inputs or outputs, a required input left
            out, an attribute that is unknown, missing or of another type.
    """
    local = {(domain, name) for domain, name, _ in model.functions}
    _check(model.graph.all_nodes(), model.opset_imports, local, file)
    for function in model.functions.values():
        _check(function.all_nodes(), function.opset_imports or model.opset_imports, local, file)


def _check(nodes: Iterable[ir.Node], imports: dict[str, int], local: set[tuple[str, str]], file: pathlib.Path) -> None:
    version = imports.get("", imports.get("ai.onnx", 0))
    if not 0 < version <= onnx.defs.onnx_opset_version():
        return  # `ensure_opset` refuses the model
    for node in nodes:
        # A runtime still knows what is deprecated.
        if (node.domain, node.op_type) not in local and (reason := misfit(node, version, deprecated=True)):
            raise ModelError(
                f"{file}, node {node.name or node.op_type}", f"{reason} in opset {version}", "export the model again"
            )


def misfit(node: ir.Node, version: int, *, deprecated: bool = False) -> str | None:
    """Say what makes a node no valid operator of an opset of the ONNX domain; None where nothing does.

    Args:
        node: Any node; those of other domains always fit.
        version: The opset.
        deprecated: Whether an operator that the opset deprecates is still valid.
    """
    if node.domain != "" or node.op_type in _RUNTIME_OPS:
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return f"{node.op_type or 'an empty name'} is no operator"
    if schema.deprecated:
        return None if deprecated else f"{node.op_type} is no longer an operator"
    for what, count, low, high in (
        ("input", len(node.inputs), schema.min_input, schema.max_input),
        ("output", len(node.outputs), schema.min_output, schema.max_output),
    ):
        if not low <= count <= high:
            return f"{node.op_type} with {count} {what}{'' if count == 1 else 's'} is no operator"
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for operand, declared in zip(node.inputs, schema.inputs, strict=False):
        if operand is None and declared.option == single:
            return f"its input {declared.name} is left out, which {node.op_type} does not allow"
    return _attribute_misfit(node, schema)


def _attribute_misfit(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    for name, attribute in node.attributes.items():
        declared = schema.attributes.get(name)
        if declared is None:
            return f"{node.op_type} has no attribute {name}"
        wanted = ir.AttributeType(int(declared.type))  # type: ignore[call-overload]  # numbered as in ONNX
        if attribute.type != wanted:
            return f"attribute {name} is {attribute.type.name} where {node.op_type} takes {wanted.name}"
    for name, declared in schema.attributes.items():
        if declared.required and name not in node.attributes:
            return f"attribute {name} is missing, which {node.op_type} needs"
    if node.op_type == "Transpose" and (perm := _value(node, "perm")) is not None:
        axes = perm.as_ints()
        return None if sorted(axes) == list(range(len(axes))) else f"perm {list(axes)} is no order of axes"
    if node.op_type == "Cast" and (to := _value(node, "to")) is not None:
        known = {int(dtype) for dtype in ir.DataType} - {int(ir.DataType.UNDEFINED)}
        return None if to.as_int() in known else f"it casts to the unknown type {to.as_int()}"
    return None


def _value(node: ir.Node, name: str) -> ir.Attr | None:
    """An attribute with a value of its own, not one that a function's caller gives."""
    attribute = node.attributes.get(name)
    return None if attribute is None or attribute.is_ref() else attribute
