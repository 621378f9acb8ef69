"""The operator domain and how its function bodies are written."""

from __future__ import annotations

__all__ = ["BODY_OPSET", "DOMAIN", "VERSION", "function_from_text"]

import onnx.parser
import onnx_ir as ir

DOMAIN = "fptq"
VERSION = 1
BODY_OPSET = 21
"""ONNX opset of the bodies, and the least a model with these ops may declare: DequantizeLinear is blocked since 21."""


def function_from_text(body: str, *, overload: str = "") -> ir.Function:
    """Parse one function of the domain from ONNX's textual syntax.

    Args:
        body: Name, attributes, signature and nodes, without the leading ``<domain, opset_import>`` block.
        overload: Tells apart several bodies of one op (ONNX IR 10); nodes name it too.

    Returns:
        The function in the domain :data:`DOMAIN`, on opset :data:`BODY_OPSET`.
    """
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {BODY_OPSET}]>\n'
    function = onnx.parser.parse_function(header + body)
    function.overload = overload
    return ir.serde.deserialize_function(function)
