"""Checks on a model file before any of its data is used; files may come from strangers."""

from __future__ import annotations

__all__ = ["check_functions", "check_graph", "check_header", "check_names", "check_tensors", "real_file"]

import logging
import ntpath
import os
import pathlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from fptq_onnx.errors import ModelError

logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 2**48
# Far above what networks have; a few lines of ONNX can ask for 2^60.
_MAX_INLINED_NODES = 2**20
_MAX_CONCAT_PARTS = 2**16
_EXPORT_AGAIN = "copy the model with all its files, or export it again"


def check_header(proto: onnx.ModelProto, file: pathlib.Path) -> None:
    """Check the versions that a model names.

    Raises:
        ModelError: There is no graph, opset or IR version, the IR version is newer than the installed onnx, or a domain
            is imported in two versions.
    """
    if not proto.HasField("graph") or not proto.opset_import or not proto.ir_version:
        raise ModelError(
            str(file), "is not an ONNX model: it has no graph, opset or IR version", "export the model again"
        )
    if proto.ir_version > onnx.IR_VERSION:
        reason = f"it has IR version {proto.ir_version}, and the installed onnx knows versions up to {onnx.IR_VERSION}"
        raise ModelError(str(file), reason, "update onnx, or export the model again")
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            reason = f"it imports the operator set {domain or 'ai.onnx'} as {versions[domain]} and as {entry.version}"
            raise ModelError(str(file), reason, "export the model again")
    if not proto.graph.output:
        raise ModelError(str(file), "the graph has no output", "export the model again")


def check_names(proto: onnx.ModelProto, file: pathlib.Path) -> None:
    """Check that names are text, and that every value of a graph is written once: by a node, input or initializer.

    Raises:
        ModelError: A name is not UTF-8, two write one value, or an initializer has no name.
    """
    for graph in _graphs(proto.graph):
        for name in _names(graph):
            if isinstance(name, bytes):  # what protobuf gives for text that is none
                raise ModelError(str(file), f"the name {name!r} is not UTF-8 text", "export the model again")
        initializers = [tensor.name for tensor in graph.initializer]
        initializers += [sparse.values.name for sparse in graph.sparse_initializer]
        if "" in initializers:
            raise ModelError(str(file), "an initializer has no name", "export the model again")
        _check_written_once(Counter(initializers), file)
        # Before IR version 4 an initializer had to be an input too.
        given = set(initializers) | {value.name for value in graph.input}
        outputs = (name for node in graph.node for name in node.output if name)
        _check_written_once(Counter([*given, *outputs]), file)


def check_functions(model: ir.Model, file: pathlib.Path) -> None:
    """Check that the functions of a model can be inlined.

    Raises:
        ModelError: One calls itself, or they expand to more than a million nodes.
    """
    sizes: dict[ir.OperatorIdentifier, int] = {}

    def size(nodes: Iterable[ir.Node], callers: tuple[ir.OperatorIdentifier, ...]) -> int:
        total = 0
        for node in nodes:
            called = node.op_identifier()
            function = model.functions.get(called)
            if function is not None and called not in sizes:
                if called in callers:
                    name = f"{function.domain}.{function.name}"
                    raise ModelError(str(file), f"function {name} calls itself", "export the model again")
                sizes[called] = size(function.all_nodes(), (*callers, called))
            total += sizes.get(called, 1)
        return total

    count = size(model.graph.all_nodes(), ())
    if count > _MAX_INLINED_NODES:
        raise ModelError(str(file), f"its functions expand to {count:.3g} nodes", "export the model again")


def check_tensors(proto: onnx.ModelProto, file: pathlib.Path) -> list[str]:
    """Check shape, type and data of every tensor of a model, embedded or external.

    Args:
        proto: The parsed model without its external data.
        file: Where it was read from; external data are looked for in its folder.

    Returns:
        Paths of the external data files as the model gives them, relative to its folder.

    Raises:
        ModelError: As described in ``load_model``.
    """
    sizes: dict[str, int] = {}
    for tensor in _tensors(proto):
        where = f"{file}, tensor {tensor.name or '(no name)'}"
        needed = _bytes_needed(tensor, where)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, needed, where, file, sizes)
        elif tensor.HasField("raw_data"):
            if needed is None or len(tensor.raw_data) != needed:
                raise ModelError(
                    where, f"holds {len(tensor.raw_data)} bytes where its shape needs {needed}", _EXPORT_AGAIN
                )
        else:
            _check_typed_data(tensor, where)
    return list(sizes)


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
    _check_concats(graph, file)
    for output in graph.outputs:
        if output not in known:
            raise ModelError(str(file), f"nothing computes the graph output {output.name}", "export the model again")


def _check_concats(graph: ir.Graph, file: pathlib.Path) -> None:
    """Refuse a tower of Concat nodes on each other: shape inference would write its value out."""
    parts: dict[ir.Value | None, int] = {}
    for node in graph:
        if node.op_type == "Concat" and node.domain == "":
            count = sum(parts.get(operand, 1) for operand in node.inputs)
            if count > _MAX_CONCAT_PARTS:
                where = f"{file}, node {node.name or node.op_type}"
                raise ModelError(where, f"it concatenates {count} parts", "export the model again")
            parts[node.outputs[0]] = count


def _names(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    for named in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        yield named.name
    for node in graph.node:
        yield from (node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name


def _check_written_once(names: Counter[str], file: pathlib.Path) -> None:
    for name, count in names.items():
        if count > 1:
            times = "twice" if count == 2 else f"{count} times"
            raise ModelError(str(file), f"value {name} is written {times}", "export the model again")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those in the attributes of its nodes, in theirs and so on."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


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
    tensor: onnx.TensorProto, needed: int | None, where: str, file: pathlib.Path, sizes: dict[str, int]
) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if location not in sizes:
        sizes[location] = _external_file_size(location, where, file)
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


def real_file(file: pathlib.Path, location: str) -> pathlib.Path | None:
    """The file behind an external data path, links resolved, if a model may read it.

    It must lie in the model's folder. Where the model file is itself a link, it may also lie directly beside the file
    that this link leads to: then the model would be as free to read it had it been opened by its real name. So the
    snapshots of a Hugging Face cache work, whose files are links into one folder of blobs, and a link to anywhere else
    is none the freer.

    Args:
        file: The model file.
        location: Relative path from the model.

    Returns:
        The file, which need not exist; None where the model may not read it.
    """
    real = (file.parent / location).resolve()
    if real.is_relative_to(file.parent.resolve()) or (file.is_symlink() and real.parent == file.resolve().parent):
        return real
    return None


def _external_file_size(location: str, where: str, file: pathlib.Path) -> int:
    """Size of an external data file after making sure that it is a plain file that the model may read."""
    inside = "keep external data beside the model, under a relative path"
    if not location or "\0" in location:
        raise ModelError(where, "its external data name no file", _EXPORT_AGAIN)
    # Windows rules as well: a file made on one system is checked the same on the other.
    if os.path.isabs(location) or ntpath.isabs(location) or ntpath.splitdrive(location)[0]:
        raise ModelError(where, f"its external data path {location} is absolute", inside)
    if ".." in location.replace("\\", "/").split("/"):
        raise ModelError(where, f'its external data path {location} contains ".."', inside)
    path = file.parent / location
    try:
        real = real_file(file, location)
    except (OSError, RuntimeError) as error:  # Python before 3.13: RuntimeError for a link to itself
        raise ModelError(where, f"its external data file {location} cannot be read: {error}", _EXPORT_AGAIN) from error
    if real is None:
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
