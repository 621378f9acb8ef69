"""Checks on a model file before any of its data is used; files may come from strangers."""

from __future__ import annotations

__all__ = ["check_graph", "check_tensors"]

import logging
import ntpath
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from fptq_onnx.errors import ModelError

logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 2**48
_EXPORT_AGAIN = "copy the model with all its files, or export it again"


def check_tensors(proto: onnx.ModelProto, file: pathlib.Path) -> None:
    """Check shape, type and data of every tensor of a model, embedded or external.

    Args:
        proto: The parsed model without its external data.
        file: Where it was read from; external data are looked for in its folder.

    Raises:
        ModelError: As described in ``load_model``.
    """
    sizes: dict[str, int] = {}
    for tensor in _tensors(proto):
        where = f"{file}, tensor {tensor.name or '(no name)'}"
        needed = _bytes_needed(tensor, where)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, needed, where, file.parent, sizes)
        elif tensor.HasField("raw_data"):
            if needed is None or len(tensor.raw_data) != needed:
                raise ModelError(
                    where, f"holds {len(tensor.raw_data)} bytes where its shape needs {needed}", _EXPORT_AGAIN
                )
        else:
            _check_typed_data(tensor, where)


def check_graph(model: ir.Model, file: pathlib.Path) -> None:
    """Check that every value read is computed before, and put the nodes in execution order where they are not.

    Raises:
        ModelError: A node reads a value that nothing computes, or the graph has a cycle.
    """
    known: set[ir.Value] = set()
    _check_order(model.graph, known, file)
    for function in model.functions.values():
        _check_order(function.graph, known, file)


def _check_order(graph: ir.Graph, known: set[ir.Value], file: pathlib.Path) -> None:
    known.update(graph.inputs)
    known.update(graph.initializers.values())
    position = {node: index for index, node in enumerate(graph)}
    if any(
        position.get(operand.producer(), -1) >= index  # type: ignore[arg-type]
        for node, index in position.items()
        for operand in node.inputs
        if operand is not None
    ):
        try:
            graph.sort()
        except ValueError as error:
            raise ModelError(str(file), "the graph has a cycle", "export the model again") from error
    for node in graph:
        for operand in node.inputs:
            if operand is not None and operand not in known:
                raise ModelError(
                    f"{file}, node {node.name or node.op_type}",
                    f"nothing computes its input {operand.name}",
                    "export the model again",
                )
        for attribute in node.attributes.values():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
                _check_order(attribute.as_graph(), known, file)
            elif not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    _check_order(inner, known, file)
        known.update(node.outputs)
    for output in graph.outputs:
        if output not in known:
            raise ModelError(str(file), f"nothing computes the graph output {output.name}", "export the model again")


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def _bytes_needed(tensor: onnx.TensorProto, where: str) -> int | None:
    """Bytes of the tensor in its raw form; None for strings, which have none."""
    elements = 1
    for dim in tensor.dims:
        elements *= dim
        if dim < 0 or elements > _MAX_ELEMENTS:
            raise ModelError(where, f"has the impossible shape {list(tensor.dims)}", _EXPORT_AGAIN)
    try:
        dtype = ir.DataType(tensor.data_type)
        return None if dtype is ir.DataType.STRING else (elements * dtype.bitwidth + 7) // 8
    except (ValueError, TypeError) as error:
        raise ModelError(where, f"has the unknown data type {tensor.data_type}", "update onnx-ir") from error


def _check_typed_data(tensor: onnx.TensorProto, where: str) -> None:
    """Check the entries of the typed fields (float_data, int32_data, ...) that hold data without raw_data."""
    elements = 1
    for dim in tensor.dims:
        elements *= dim
    dtype = ir.DataType(tensor.data_type)
    if dtype is ir.DataType.STRING:
        held, needed = len(tensor.string_data), elements
    else:
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        held = sum(map(len, fields))
        complex_parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        needed = (elements * dtype.bitwidth + 7) // 8 if dtype.bitwidth < 8 else elements * complex_parts
    if held != needed:
        raise ModelError(where, f"holds {held} elements where its shape needs {needed}", _EXPORT_AGAIN)


def _check_external(
    tensor: onnx.TensorProto, needed: int | None, where: str, folder: pathlib.Path, sizes: dict[str, int]
) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if location not in sizes:
        sizes[location] = _external_file_size(location, where, folder)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else needed
    except ValueError as error:
        raise ModelError(where, "its external data offset or length is no number", _EXPORT_AGAIN) from error
    if needed is None or length is None:
        raise ModelError(where, "holds strings in external data, which ONNX does not allow", _EXPORT_AGAIN)
    if offset < 0 or length != needed:
        raise ModelError(where, f"external data of {length} bytes at {offset}, its shape needs {needed}", _EXPORT_AGAIN)
    if offset + length > sizes[location]:
        raise ModelError(
            where,
            f"external data file {location} is too short: {sizes[location]} bytes, {offset + length} needed",
            _EXPORT_AGAIN,
        )


def _external_file_size(location: str, where: str, folder: pathlib.Path) -> int:
    """Size of an external data file after making sure that it is a plain file inside the model's folder."""
    inside = "keep external data beside the model, under a relative path"
    if not location or "\0" in location:
        raise ModelError(where, "its external data name no file", _EXPORT_AGAIN)
    # Windows rules as well: a file made on one system is checked the same on the other.
    if os.path.isabs(location) or ntpath.isabs(location) or ntpath.splitdrive(location)[0]:
        raise ModelError(where, f"its external data path {location} is absolute", inside)
    if ".." in location.replace("\\", "/").split("/"):
        raise ModelError(where, f'its external data path {location} contains ".."', inside)
    path = folder / location
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(
            where,
            f"its external data file {location} is a link that leaves the model's folder",
            "copy the file itself there",
        )
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(
            where, f"its external data file {location} cannot be read: {error.strerror}", _EXPORT_AGAIN
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(where, f"its external data file {location} is not a regular file", _EXPORT_AGAIN)
    if status.st_nlink > 1:  # onnx_ir and onnx refuse to map such a file, as it may be one of another owner
        raise ModelError(
            where, f"its external data file {location} has several hard links", "copy the file itself there"
        )
    return status.st_size
