"""Follow a value back to the constant it is computed from, and evaluate that computation."""

from __future__ import annotations

__all__ = ["constant_array", "constant_number", "constant_shape", "evaluate_path", "integers", "root_initializer"]

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fptq_onnx.errors import ModelError

_PATH_OPS = frozenset({"Identity", "Transpose", "Cast", "DequantizeLinear"})
# A scale may itself be dequantized (double quantization); files of strangers nest further, at exponential cost.
_MAX_NESTED_SCALES = 2


def root_initializer(value: ir.Value | None, _nested: int = 0) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """Find the initializer behind a constant value.

    Args:
        value: Any value; it may pass through Identity, Transpose, Cast and DequantizeLinear (constant scale).

    Returns:
        The initializer and the nodes between it and ``value`` in data-flow order, or None when ``value`` depends on
        anything else. An initializer that is also a graph input is not constant: a caller may replace it.
    """
    path: list[ir.Node] = []
    while value is not None:
        if value.is_initializer() and value.const_value is not None and not value.is_graph_input():
            return value, tuple(reversed(path))
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _PATH_OPS or len(path) > 16:
            return None
        if _nested > _MAX_NESTED_SCALES or any(
            operand is not None and root_initializer(operand, _nested + 1) is None for operand in node.inputs[1:]
        ):
            return None
        path.append(node)
        value = node.inputs[0]
    return None


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """Evaluate a constant value, or return None when it is not constant.

    Returns:
        The array in its own dtype for initializers and Constant nodes, float32 behind a path of float nodes.
    """
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and producer.domain == "":
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()
    found = root_initializer(value)
    if found is None:
        return None
    root, path = found
    assert root.const_value is not None
    return evaluate_path(root.const_value.numpy(), path)


def constant_number(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds, or None for anything else."""
    array = constant_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def constant_shape(root: ir.Value, path: tuple[ir.Node, ...]) -> tuple[int, ...]:
    """Return the shape at the end of a path from ``root_initializer`` without reading the data."""
    assert root.const_value is not None
    shape = tuple(root.const_value.shape.numpy())
    for node in path:
        if node.op_type == "Transpose":
            permutation = _permutation(node, len(shape))
            shape = tuple(shape[axis] for axis in permutation)
    return shape


def evaluate_path(array: np.ndarray, path: tuple[ir.Node, ...]) -> np.ndarray:
    """Apply the nodes of a path from ``root_initializer`` to the initializer's array.

    Raises:
        ModelError: A Cast to a type numpy cannot hold, or a DequantizeLinear whose scale does not fit.
    """
    for node in path:
        if node.op_type == "Transpose":
            array = array.transpose(_permutation(node, array.ndim))
        elif node.op_type == "Cast":
            array = array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
        elif node.op_type == "DequantizeLinear":
            array = _dequantize(node, array)
    return array


def integers(value: ir.Value | None, _depth: int = 0) -> list[int | None] | None:
    """Evaluate an integer vector such as the shape input of Reshape as far as it is constant.

    Returns:
        One entry per element, None for an element that is only known at run time; None when even the length is unknown.
    """
    if value is None or _depth > 16:
        return None
    array = constant_array(value)
    if array is not None:
        return [int(item) for item in np.atleast_1d(array)] if array.ndim <= 1 else None
    node = value.producer()
    if node is not None and node.domain == "":
        if node.op_type == "Concat":
            parts = [integers(operand, _depth + 1) for operand in node.inputs]
            return None if any(part is None for part in parts) else [item for part in parts for item in part or ()]
        if node.op_type in ("Unsqueeze", "Cast", "Identity", "Squeeze") or (
            node.op_type == "Reshape" and value.shape is not None and value.shape.is_static()
        ):
            found = integers(node.inputs[0], _depth + 1)
            if found is not None:
                return found
            # Unsqueeze of a scalar computed at run time, the exporters' way to one entry of a shape.
            return [None] if node.op_type == "Unsqueeze" else None
    if value.shape is not None and value.shape.is_static() and value.shape.rank() <= 1:
        return [None] * int(np.prod(value.shape.numpy(), dtype=np.int64))
    if node is not None and node.op_type == "Shape" and {"start", "end"} <= node.attributes.keys():
        length = node.attributes["end"].as_int() - node.attributes["start"].as_int()
        return [None] * length if length >= 0 else None
    return None


def _permutation(node: ir.Node, rank: int) -> tuple[int, ...]:
    if "perm" in node.attributes:
        return tuple(node.attributes["perm"].as_ints())
    return tuple(reversed(range(rank)))


def _dequantize(node: ir.Node, array: np.ndarray) -> np.ndarray:
    """DequantizeLinear of opset 10 to 23: y = (x - zero_point) * scale, per tensor, per axis or blocked."""
    scale = constant_array(node.inputs[1])
    zero_point = constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    assert scale is not None
    output_type = scale.dtype
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0

    def spread(parameter: np.ndarray) -> np.ndarray:
        if parameter.size == 1:
            return parameter.reshape(())
        if block:
            return np.repeat(parameter, block, axis=axis).take(range(array.shape[axis]), axis=axis)
        shape = [1] * array.ndim
        shape[axis] = -1
        return parameter.reshape(shape)

    try:
        centred = array.astype(np.float32)
        if zero_point is not None:
            centred = centred - spread(zero_point.astype(np.float32))
        return np.asarray(centred * spread(scale.astype(np.float32)), dtype=output_type)
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"node {node.name}",
            f"its scale of shape {scale.shape} does not fit its input of shape {array.shape}",
            "export the model again",
        ) from error


# numpy only knows bfloat16 and the float8 types once ml_dtypes has registered them.
_ = ml_dtypes.bfloat16
