"""Load and save ONNX models: external data stays on disk, bad files are refused, results appear whole or not at all."""

from __future__ import annotations

__all__ = [
    "EXTERNAL_DATA_THRESHOLD",
    "data_locations",
    "load_model",
    "release_mappings",
    "save_model",
    "source_file",
    "source_files",
]

import contextlib
import logging
import os
import pathlib
import stat
from collections.abc import Iterator

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from fptq_onnx.errors import ModelError, why_unreadable
from fptq_onnx.graph.node_rules import check_nodes
from fptq_onnx.graph.output_files import refuse_overwriting, staged
from fptq_onnx.graph.wellformed import (
    check_functions,
    check_graph,
    check_header,
    check_names,
    check_tensors,
    real_file,
)

logger = logging.getLogger(__name__)

EXTERNAL_DATA_THRESHOLD = 100 * 2**20
"""Bytes of initializers above which ``save_model`` writes them to a file of their own."""

_SOURCE = "fptq_onnx.source"
_MAPPED = "fptq_onnx.mapped"
_LOCATIONS = "fptq_onnx.locations"
_LFS = b"version https://git-lfs"
# Smaller tensors stay in the model file. The others start on a page, as memory mapping and vector loads like it.
_EMBEDDED_BYTES = 1024
_PAGE = 4096


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read a model, leaving external data on disk (memory-mapped when used).

    Every node gets a unique name, Constant tensors of 16 elements or more become initializers, and shapes are inferred
    where the file has hardly any.

    Args:
        path: An ONNX file in protobuf form.

    Returns:
        The model; its external tensors are checked ``onnx_ir.ExternalTensor`` objects.

    Raises:
        ModelError: The file is missing, truncated or no ONNX model; the graph reads a value that nothing computes,
            writes one twice, has a cycle or a node that breaks its operator's rules; a tensor does not have the bytes
            its shape needs; external data are missing, too short, given by an absolute path or one with "..", or
            reached through a link that leaves the model's folder (see ``real_file`` for the one exception).
    """
    file = pathlib.Path(path).absolute()
    proto = _parse(file)
    check_header(proto, file)
    check_names(proto, file)
    locations = check_tensors(proto, file)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds for malformed graphs
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ModelError(str(file), f"the graph cannot be read: {reason[0]}", "export the model again") from error
    ir.external_data.set_base_dir(model.graph, file.parent)
    if file.is_symlink():
        _read_real_files(model, file)
    check_graph(model, file)
    check_functions(model, file)
    check_nodes(model, file)
    if model.ir_version < 4:  # there initializers had to be inputs too
        ir.passes.common.RemoveInitializersFromInputsPass()(model)
    ir.passes.common.LiftConstantsToInitializersPass()(model)
    ir.passes.common.NameFixPass(_NodeNames())(model)
    _infer_missing_shapes(model)
    model.meta[_SOURCE] = file
    model.meta[_LOCATIONS] = locations
    model.meta[_MAPPED] = list(_external_tensors(model))
    logger.debug("loaded %s: IR %d, opsets %s", file, model.ir_version, dict(model.opset_imports))
    return model


def source_file(model: ir.Model) -> pathlib.Path | None:
    """Return the file a model was loaded from, None for a model made in memory."""
    source = model.meta.get(_SOURCE)
    return None if source is None else pathlib.Path(source)


def source_files(model: ir.Model) -> set[pathlib.Path]:
    """Return the files a model still reads from: its own and those of its external tensors, links resolved."""
    files = {pathlib.Path(tensor.path).resolve() for tensor in _external_tensors(model)}
    source = source_file(model)
    return files if source is None else files | {pathlib.Path(os.path.realpath(source))}


def data_locations(model: ir.Model) -> list[str]:
    """Return the paths, relative to its file, under which a loaded model names its external data."""
    return list(model.meta.get(_LOCATIONS, ()))


def release_mappings(model: ir.Model) -> None:
    """Unmap the external data that were read so far, so that they stop counting as memory of this process.

    They are mapped again when somebody reads them, also through constants that passes computed from them.
    """
    for tensor in model.meta.get(_MAPPED, ()):
        # An array that somebody still holds keeps its mapping alive.
        with contextlib.suppress(BufferError):
            tensor.release()


def save_model(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model so that ``path`` holds either the whole new model or what it held before.

    Initializers go to ``<name>.data`` beside the model when they are over ``EXTERNAL_DATA_THRESHOLD`` bytes together or
    the model had external data before; they are streamed, one tensor in memory at a time. The same model gives the
    same bytes.

    Args:
        model: The model; it is not changed.
        path: The file to write; its folder must exist.

    Raises:
        ModelError: ``path`` or its data file is a file the model was loaded from, or writing failed (folder missing or
            read-only, disk full); then nothing is left behind.
    """
    file = pathlib.Path(path).absolute()
    data = file.with_name(file.name + ".data")
    refuse_overwriting((file, data), source_files(model))
    size = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    external = size > EXTERNAL_DATA_THRESHOLD or any(True for _ in _external_tensors(model))
    with staged(file) as staging:
        try:
            if external:
                ir.save(
                    model,
                    staging.path,
                    format="protobuf",
                    external_data=data.name,
                    size_threshold_bytes=_EMBEDDED_BYTES,
                    alignment=_PAGE,
                    align_threshold=0,
                )
            else:
                ir.save(model, staging.path, format="protobuf")
        except OSError as error:
            raise ModelError(
                str(file), f"cannot be written: {error.strerror or error}", "check the folder and the free space"
            ) from error
        except (EncodeError, ir.serde.SerdeError, ValueError, TypeError) as error:
            raise ModelError(str(file), f"the graph cannot be written: {error}", "report this as a bug") from error
        staging.publish()
    logger.debug("wrote %s (%d bytes of initializers, external data: %s)", file, size, external)


def _parse(file: pathlib.Path) -> onnx.ModelProto:
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise ModelError(str(file), why_unreadable(error), "check the path") from error
    if not stat.S_ISREG(mode):
        raise ModelError(str(file), "is not a regular file", "give the path of the .onnx file itself")
    try:
        proto = onnx.load(str(file), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(str(file), why_unreadable(error), "check the permissions") from error
    except (DecodeError, RuntimeError, ValueError) as error:
        if _starts_with(file, _LFS):
            raise ModelError(str(file), "is a Git LFS pointer, not the file itself", "run `git lfs pull`") from error
        raise ModelError(
            str(file),
            "is not a complete ONNX protobuf file (truncated, corrupt or another format)",
            "copy or export it again",
        ) from error
    return proto


def _starts_with(file: pathlib.Path, start: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def _read_real_files(model: ir.Model, file: pathlib.Path) -> None:
    """Point external tensors of a model that is a link at the files behind links: runtimes refuse such links."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            real = real_file(file, str(tensor.location)) if isinstance(tensor, ir.ExternalTensor) else None
            if isinstance(tensor, ir.ExternalTensor) and real is not None:
                value.const_value = ir.ExternalTensor(
                    real.name,
                    tensor.offset,
                    tensor.length,
                    dtype=tensor.dtype,
                    shape=ir.Shape(tensor.shape),
                    name=tensor.name or "",
                    base_dir=real.parent,
                )


def _infer_missing_shapes(model: ir.Model) -> None:
    """Infer shapes when most are missing, as in files of torch's older exporter: head counts are read off them."""
    outputs = [output for node in model.graph for output in node.outputs]
    if 2 * sum(output.shape is None for output in outputs) > len(outputs):
        ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


class _NodeNames:
    """Names for nodes and values that have none, read by ``NameFixPass``, which makes all names unique."""

    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or node.op_type

    def generate_value_name(self, value: ir.Value) -> str:
        return value.name or "value"
