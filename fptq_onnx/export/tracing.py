"""Traces a torch module with torch.onnx.export, leaving nothing of this machine in the graph."""

from __future__ import annotations

__all__ = ["quiet", "trace"]

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
import transformers

from fptq_onnx.errors import ModelError
from fptq_onnx.export.signatures import Signature


def trace(signature: Signature, opset: int) -> ir.Model:
    """Trace with torch.export and translate to ONNX.

    Returns:
        The graph; its initializers still share memory with the torch model.

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
    return program.model


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


def _drop_traces(model: ir.Model) -> None:
    """Remove stack traces from node metadata: they hold local paths and make up most of the file."""
    containers: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for container in containers:
        for node in container.all_nodes():
            for key in [key for key in node.metadata_props if key != "namespace"]:
                del node.metadata_props[key]
