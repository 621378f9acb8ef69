"""What the nodes of the integer products share."""

from __future__ import annotations

__all__ = ["matmul_node"]

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from fptq_onnx.ops.domain import DOMAIN


def matmul_node(
    op: str,
    inputs: Sequence[ir.Value],
    *,
    attributes: Mapping[str, int] | None = None,
    overload: str = "",
    name: str | None = None,
) -> ir.Node:
    """Build a node of an integer product with what is known of its output.

    Args:
        op: Name of the op.
        inputs: The activations first, B and b_scale last.
        attributes: Of the op.
        overload: Which of the op's function bodies the node has.
        name: Of the node.

    Returns:
        The node; its output has the type of b_scale and, where A's and B's shapes are known, [..., N].
    """
    node = ir.node(op, inputs, attributes=attributes, domain=DOMAIN, overload=overload, name=name)
    a, *_, b, b_scale = inputs
    output = node.outputs[0]
    if b_scale.dtype is not None:
        output.type = ir.TensorType(b_scale.dtype)
    if a.shape is not None and b.shape is not None:
        output.shape = ir.Shape([*a.shape[:-1], b.shape[1]])
    return node
