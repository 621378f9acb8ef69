"""Sessions of models that exist only in memory, of any size, without a temporary file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.errors import ModelError, RuntimeUnavailableError
from fptq_onnx.graph.model_file import source_file

__all__ = ["memory_session"]

logger = logging.getLogger(__name__)

# Smaller tensors are part of the serialized graph; shape constants must be, for shape inference to see them.
_INLINE_BYTES = 1024


def memory_session(
    model: ir.Model,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    *,
    threads: int | None = None,
    configure: Callable[[Any], None] | None = None,
    where: str | None = None,
) -> Any:
    """Create an onnxruntime session for a model in memory.

    Only the graph is serialized. Weights in an external data file are left there for onnxruntime to map; others are
    handed over by reference (`SessionOptions.add_external_initializers`), so the 2 GB limit of protobuf is out of
    reach. Nodes run in graph order, not in onnxruntime's default depth-first order, which would run the whole
    network before the reductions of an observed model and so keep every activation alive.

    Args:
        model: Left as it is.
        providers: Execution providers.
        threads: Intra-op threads, onnxruntime's choice if None.
        where: How to name the model in errors; by default the file it was loaded from.
        configure: Receives the SessionOptions before the session is made, such as to register a custom-op library.

    Raises:
        RuntimeUnavailableError: onnxruntime is not installed.
        ModelError: onnxruntime refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(
            "onnxruntime", "is not installed", "Install fptq-onnx[cpu] or fptq-onnx[gpu]"
        ) from error
    options = onnxruntime.SessionOptions()
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if configure is not None:
        configure(options)
    copy = model.clone()
    folder = _common_folder(copy)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    weights = _detach_weights(copy, folder, onnxruntime)
    if weights:
        options.add_external_initializers(list(weights), [borrowed for borrowed, _ in weights.values()])
    logger.debug("session with %d weights by reference, external data in %s", len(weights), folder)
    try:
        session = onnxruntime.InferenceSession(
            ir.to_proto(copy).SerializeToString(), options, providers=list(providers)
        )
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ModelError(
            where or str(source_file(model) or "the model"),
            f"cannot be loaded by onnxruntime: {error}",
            "Correct the model, or export it again",
        ) from error
    session.fptq_weights = weights  # borrowed by the session, so they must live as long
    return session


def _common_folder(model: ir.Model) -> str | None:
    """The folder of the external data, if there is just one."""
    folders = {
        os.path.abspath(value.const_value.base_dir)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return folders.pop() if len(folders) == 1 else None


def _detach_weights(model: ir.Model, folder: str | None, onnxruntime: Any) -> dict[str, tuple[Any, Any]]:
    """Replace large weights by references to nowhere; return their OrtValues, and the arrays these borrow, by name."""
    weights = {}
    outside, inside = _read_names(model)
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        external = isinstance(tensor, ir.ExternalTensor)
        if name not in outside and name not in inside and not value.is_graph_input():
            del model.graph.initializers[name]
            continue
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        if (external and folder is not None) or (not external and tensor.nbytes <= _INLINE_BYTES):
            continue
        array = np.ascontiguousarray(tensor.numpy())
        # onnxruntime looks for a tensor handed over by reference in the main graph, from which it has removed what
        # nothing reads there, or only a branch of an If that was inlined.
        if tensor.nbytes <= _INLINE_BYTES or name in inside or not _can_be_handed_over(array):
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=name)
            continue
        if tensor.dtype == ir.DataType.BFLOAT16:
            array = array.view(np.uint16)
            borrowed = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype))
        else:
            borrowed = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        weights[name] = (borrowed, array)
        value.const_value = ir.ExternalTensor(
            "in-memory", 0, tensor.nbytes, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return weights


def _read_names(model: ir.Model) -> tuple[set[str | None], set[str | None]]:
    """Names of the values that the main graph reads or gives out, and of those that its subgraphs read."""
    outside = {value.name for value in model.graph.outputs}
    inside: set[str | None] = set()
    for node in model.graph.all_nodes():
        names = outside if node.graph is model.graph else inside
        names.update(operand.name for operand in node.inputs if operand is not None)
    return outside, inside


def _can_be_handed_over(array: npt.NDArray[Any]) -> bool:
    """Whether onnxruntime takes arrays of this type; int4 and float8 can only be part of the serialized graph."""
    return array.dtype.kind in "biuf" or array.dtype == ml_dtypes.bfloat16
