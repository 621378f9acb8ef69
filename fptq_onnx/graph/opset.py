"""Bring a model to an operator set that has INT4 tensors and blocked DequantizeLinear."""

from __future__ import annotations

__all__ = ["MINIMUM_IR_VERSION", "MINIMUM_OPSET", "ensure_opset"]

import contextlib
import logging
from collections.abc import Iterator

import onnx
import onnx_ir as ir
import onnxscript.version_converter

from fptq_onnx.errors import ModelError
from fptq_onnx.graph.node_rules import misfit

logger = logging.getLogger(__name__)

MINIMUM_OPSET = 21
"""First operator set with INT4 and with block_size in DequantizeLinear."""

MINIMUM_IR_VERSION = 10
"""First IR version with INT4 tensors."""

# Their meaning changed between opset 18 and 21; the converter leaves a node as it is when it cannot tell its shapes.
_REDEFINED = frozenset({"DFT", "GridSample", "GroupNormalization"})


def ensure_opset(model: ir.Model, version: int = MINIMUM_OPSET) -> int:
    """Convert a model in place to at least the given ONNX operator set, and to IR version 10.

    Opset 18 and later are converted by onnxscript, earlier ones by onnx's own converter; then every node is checked
    against its schema in the new opset. A model at or above ``version`` keeps its opset and nodes.

    Args:
        model: The model. Call this before ``find_linears``: conversion may replace nodes.
        version: The opset needed.

    Returns:
        The opset the model had before.

    Raises:
        ModelError: The model names no ONNX opset, or a node cannot be converted.
    """
    before = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if before <= 0:
        raise ModelError("model", "it does not say which ONNX operator set it uses", "export the model again")
    newest = onnx.defs.onnx_opset_version()
    if before > newest:
        raise ModelError(
            "model",
            f"it uses opset {before}, and the installed onnx {onnx.__version__} knows opsets up to {newest}",
            f"update onnx, or export the model with opset {newest} or earlier",
        )
    if before < version:
        redefined = [node for node in _nodes(model) if node.domain == "" and node.op_type in _REDEFINED]
        fix = f"export the model with opset {version} or later"
        try:
            with _quiet(onnxscript.version_converter.__name__):
                onnxscript.version_converter.convert_version(model, version, fallback=True)
        except Exception as error:  # the converters raise many kinds
            raise ModelError("model", f"cannot be converted from opset {before} to {version}: {error}", fix) from error
        if model.opset_imports.get("") != version:
            raise ModelError("model", f"cannot be converted from opset {before} to {version}", fix)
        left = [node for node in redefined if node.graph is not None]
        if left:
            reason = f"{left[0].op_type} cannot be converted from opset {before} to {version}"
            raise ModelError(f"node {left[0].name}", reason, fix)
        for node in _nodes(model):
            if (misfitting := misfit(node, version)) is not None:
                reason = f"{misfitting} in opset {version}, to which opset {before} was converted"
                raise ModelError(f"node {node.name}", reason, fix)
        logger.info("converted the model from opset %d to %d", before, version)
    model.ir_version = max(model.ir_version, MINIMUM_IR_VERSION)
    return before


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence the warnings of another library's logger: what they say is checked afterwards."""
    other = logging.getLogger(name)
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(level)
