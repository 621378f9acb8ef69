"""The operator domain and how its function bodies are written."""

from __future__ import annotations

__all__ = ["BODY_OPSET", "DOMAIN", "VERSION", "function_from_text"]

from collections.abc import Mapping

import onnx.parser
import onnx_ir as ir

DOMAIN = "fptq"
VERSION = 1
BODY_OPSET = 21
"""ONNX opset of the bodies, and the least a model with these ops may declare: DequantizeLinear is blocked since 21."""


def function_from_text(body: str, *, overload: str = "", imports: Mapping[str, int] | None = None) -> ir.Function:
    """Parse one function of the domain from ONNX's textual syntax.

    Args:
        body: Name, attributes, signature and nodes, without the leading ``<domain, opset_import>`` block.
        overload: Tells apart several bodies of one op (ONNX IR 10); nodes name it too.
        imports: Versions of further operator domains that the body uses.

    Returns:
        The function in the domain :data:`DOMAIN`, on opset :data:`BODY_OPSET`.
    """
    versions = {"": BODY_OPSET} | dict(imports or {})
    listed = ", ".join(f'"{domain}" : {version}' for domain, version in versions.items())
    header = f'<domain: "{DOMAIN}", opset_import: [{listed}]>\n'
    function = onnx.parser.parse_function(header + body)
    function.overload = overload
    return ir.serde.deserialize_function(function)
