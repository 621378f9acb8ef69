"""Triton's model configuration (config.pbtxt) of an ONNX model, and its check against Triton's own schema.

The format is the protobuf text form of `inference.ModelConfig` (model_config.proto of triton-inference-server/common).
The fields used here are those the onnxruntime backend reads.
"""

from __future__ import annotations

__all__ = ["TritonOptions", "TritonTensor", "check_schema", "render_config", "tensors_of"]

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from fptq_onnx.errors import ModelError, RuntimeUnavailableError

_TYPES = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.UINT16: "TYPE_UINT16",
    ir.DataType.UINT32: "TYPE_UINT32",
    ir.DataType.UINT64: "TYPE_UINT64",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT16: "TYPE_INT16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.DOUBLE: "TYPE_FP64",
    ir.DataType.STRING: "TYPE_STRING",
    ir.DataType.BFLOAT16: "TYPE_BF16",
}


@dataclass(frozen=True)
class TritonTensor:
    """One input or output.

    Attributes:
        name: Name in the graph.
        data_type: Triton's name of the element type, such as "TYPE_FP32".
        dims: All dimensions, -1 where the graph leaves one open.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class TritonOptions:
    """How the server runs the model.

    Attributes:
        provider: "cpu" or "cuda".
        instances: Sessions per CPU or per GPU.
        max_batch_size: Requests that may be joined; 0 turns batching off.
        queue_delay_us: Microseconds that a request may wait for others to join.
        threads: Intra-op threads of a session; None for onnxruntime's choice.
    """

    provider: Literal["cpu", "cuda"] = "cpu"
    instances: int = 1
    max_batch_size: int = 8
    queue_delay_us: int = 100
    threads: int | None = None


def tensors_of(values: Sequence[ir.Value], where: str) -> list[TritonTensor]:
    """Describe graph inputs or outputs as Triton sees them.

    Raises:
        ModelError: One has no name, an unknown rank or a type that Triton does not know.
    """
    tensors = []
    for value in values:
        name = value.name or ""
        data_type = None if value.dtype is None else _TYPES.get(value.dtype)
        if data_type is None:
            raise ModelError(
                f"{where}, {name}", f"has type {value.dtype}, which Triton does not know", "Cast it inside the model"
            )
        if value.shape is None:
            raise ModelError(f"{where}, {name}", "declares no rank", "Export the model with shapes")
        tensors.append(TritonTensor(name, data_type, tuple(d if isinstance(d, int) else -1 for d in value.shape)))
    return tensors


def can_batch(tensors: Iterable[TritonTensor]) -> bool:
    """Whether requests can be joined: the first dimension of every input and output is open."""
    return all(tensor.dims and tensor.dims[0] == -1 for tensor in tensors)


def render_config(
    name: str,
    inputs: Sequence[TritonTensor],
    outputs: Sequence[TritonTensor],
    options: TritonOptions,
    op_library: str | None,
) -> str:
    """Write a config.pbtxt.

    Args:
        name: Name of the model, also that of its folder.
        inputs: Inputs of the graph, caches among them.
        outputs: Outputs of the graph.
        options: How to run it. A `max_batch_size` above 0 needs an open first dimension everywhere (`can_batch`).
        op_library: Path of the op library as the server sees it; None for models without custom ops.

    Returns:
        The text.
    """
    batched = options.max_batch_size > 0
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {options.max_batch_size}",
    ]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            lines += [f"{kind} {{", f"  name: {_quoted(tensor.name)}", f"  data_type: {tensor.data_type}"]
            lines += [*_dims(tensor.dims[1:] if batched else tensor.dims), "}"]
    if batched:
        lines += ["dynamic_batching {", f"  max_queue_delay_microseconds: {options.queue_delay_us}", "}"]
    kind = "KIND_GPU" if options.provider == "cuda" else "KIND_CPU"
    lines += ["instance_group {", f"  count: {options.instances}", f"  kind: {kind}", "}"]
    if options.threads is not None:
        lines += ["parameters {", '  key: "intra_op_thread_count"']
        lines += [f'  value {{ string_value: "{options.threads}" }}', "}"]
    if op_library is not None:
        lines += ["model_operations {", f"  op_library_filename: {_quoted(op_library)}", "}"]
    return "\n".join(lines) + "\n"


def check_schema(config: str, where: str) -> bool:
    """Parse a config.pbtxt by Triton's own schema.

    Args:
        config: The text.
        where: How to name it in an error.

    Returns:
        True if it was checked; False where tritonclient, which brings the schema, is not installed.

    Raises:
        ModelError: It does not fit the schema.
        RuntimeUnavailableError: tritonclient is installed but does not import.
    """
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tritonclient.grpc import model_config_pb2
    except ModuleNotFoundError:
        return False
    except Exception as error:  # such as protobuf of another major version
        raise RuntimeUnavailableError(
            "tritonclient", f"it does not import ({error})", "Run `pip install 'fptq-onnx[triton]'`"
        ) from error
    try:
        text_format.Parse(config, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ModelError(where, f"does not fit Triton's schema ({error})", "Report this as a bug") from error
    return True


def _dims(dims: Sequence[int]) -> list[str]:
    if dims:
        return [f"  dims: [ {', '.join(map(str, dims))} ]"]
    # Triton knows no scalars: one element, which the backend reshapes.
    return ["  dims: [ 1 ]", "  reshape { shape: [ ] }"]


def _quoted(text: str) -> str:
    # JSON's escapes are among those of protobuf's text form; \\u is understood there too.
    return json.dumps(text)
