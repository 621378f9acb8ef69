"""Traces a torch module with torch.onnx.export and writes the graph, clean of everything local to this machine."""

from __future__ import annotations

__all__ = ["quiet", "remove", "save", "trace"]

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from fptq_onnx.errors import ModelError
from fptq_onnx.export.signatures import Signature

# From this size on the weights go into a file of their own, as everywhere in this package.
_EXTERNAL_BYTES = 100 << 20


def trace(signature: Signature, opset: int) -> Any:
    """Trace with torch.export and translate to ONNX.

    Returns:
        A torch.onnx.ONNXProgram whose weights are still those of the torch model.

    Raises:
        ModelError: The architecture cannot be traced or translated.
    """
    try:
        program = torch.onnx.export(
            signature.module.eval(),
            signature.example,
            dynamo=True,
            dynamic_shapes=signature.dynamic_shapes,
            input_names=signature.interface.inputs,
            output_names=signature.interface.outputs,
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        where = type(getattr(signature.module, "model", signature.module)).__name__
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ModelError(
            where, f"torch.onnx.export cannot translate it ({reason})", "Export it without the cache, or upgrade torch"
        ) from error
    assert program is not None  # None is for dynamo=False only
    _drop_traces(program.model)
    return program


def save(program: Any, path: Path) -> int:
    """Write the model so that a reader never sees half of it.

    Args:
        program: The traced program.
        path: The model file; weights of 100 MiB and more go to "<name>.data" beside it.

    Returns:
        Bytes written.
    """
    weight_bytes = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        program.save(Path(folder) / path.name, external_data=weight_bytes >= _EXTERNAL_BYTES)
        written = sorted(Path(folder).iterdir(), reverse=True)  # "model.onnx.data" before "model.onnx"
        size = sum(file.stat().st_size for file in written)
        remove(path)
        for file in written:
            os.replace(file, path.parent / file.name)
    return size


def remove(path: Path) -> None:
    """Delete a model file and its external data, where they exist."""
    for file in (path, path.with_name(path.name + ".data")):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch and transformers print about themselves; errors still pass."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _drop_traces(model: Any) -> None:
    """Remove stack traces from node metadata: they hold local paths and make up most of the file."""
    for graph_or_function in (model.graph, *model.functions.values()):
        for node in graph_or_function.all_nodes():
            for key in [key for key in node.metadata_props if key != "namespace"]:
                del node.metadata_props[key]
