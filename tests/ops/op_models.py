"""One-node models of the custom ops, and sessions on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from fptq_onnx import ops
from fptq_onnx.errors import RuntimeUnavailableError
from fptq_onnx.passes.add_functions import AddFunctionsPass

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ISA_VARIABLE = "FPTQ_CPU_ISA"
# Half the distance of neighbouring numbers, relative: what rounding a result to T may cost.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def library_path() -> str:
    """The library under test; a test session without one is an error, not a skip."""
    try:
        return str(ops.get_library_path())
    except RuntimeUnavailableError as error:
        pytest.fail(str(error))


def available_kernels() -> list[str]:
    """The instruction sets that the library offers on this machine, from its own error message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, "?")
        with pytest.raises(Exception, match="Use one of") as refused:
            open_session(quantize_model("float32"))
    return str(refused.value).split("Use one of: ")[1].split(".")[0].split(", ")


def model_of(
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    initializers: Sequence[ir.Value],
    outputs: Sequence[ir.Value] | None = None,
) -> ir.Model:
    """A model of a few nodes; the outputs are by default those of the last."""
    graph = ir.Graph(
        inputs,
        nodes[-1].outputs if outputs is None else outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": ops.BODY_OPSET, ops.DOMAIN: ops.VERSION},
        name="one_node",
    )
    model = ir.Model(graph, ir_version=10, producer_name="tests")
    AddFunctionsPass()(model)
    return model


def constant(name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """An initializer."""
    tensor = ir.Tensor(array, dtype=dtype, name=name) if dtype is not None else ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def value(name: str, dtype: ir.DataType, shape: Sequence[int | str | None] | None) -> ir.Value:
    """A graph input."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))


def _named(node: ir.Node, *names: str) -> ir.Node:
    for output, name in zip(node.outputs, names, strict=True):
        output.name = name
    return node


def _readable(node: ir.Node) -> list[ir.Node]:
    # numpy has no bfloat16, so onnxruntime's Python API cannot hand such a tensor out
    output = node.outputs[0]
    if output.dtype is not ir.DataType.BFLOAT16:
        return [node]
    cast = ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT.value})
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    output.name = "y_bfloat16"
    return [node, _named(cast, "Y")]


def matmul_model(
    b: np.ndarray,
    b_scale: np.ndarray,
    block_size: int,
    *,
    zero_point: int = 128,
    scale_max_multiple: int = 0,
    a_shape: Sequence[int | str | None] | None = None,
    a_scale_shape: Sequence[int | str | None] | None = None,
) -> ir.Model:
    """W4A8MatMul on the inputs A and a_scale."""
    a = value("A", ir.DataType.UINT8, a_shape)
    a_scale = value("a_scale", ir.DataType.FLOAT, a_scale_shape)
    initializers = [
        constant("a_zero_point", np.array(zero_point, dtype=np.uint8)),
        constant("B", b.astype(ml_dtypes.int4), ir.DataType.INT4),
        constant("b_scale", b_scale),
    ]
    node = ops.w4a8_matmul.w4a8_matmul(
        a, a_scale, *initializers, block_size=block_size, scale_max_multiple=scale_max_multiple, name="the_node"
    )
    return model_of(_readable(_named(node, "Y")), [a, a_scale], initializers)


def int8_matmul_model(
    b: np.ndarray,
    b_scale: np.ndarray,
    *,
    zero_point: int = 128,
    a_shape: Sequence[int | str | None] | None = None,
    a_scale_shape: Sequence[int | str | None] | None = None,
) -> ir.Model:
    """W8A8MatMul on the inputs A and a_scale."""
    a = value("A", ir.DataType.UINT8, a_shape)
    a_scale = value("a_scale", ir.DataType.FLOAT, a_scale_shape)
    initializers = [
        constant("a_zero_point", np.array(zero_point, dtype=np.uint8)),
        constant("B", b),
        constant("b_scale", b_scale),
    ]
    node = ops.w8a8_matmul.w8a8_matmul(a, a_scale, *initializers, name="the_node")
    return model_of(_readable(_named(node, "Y")), [a, a_scale], initializers)


def dynamic_matmul_model(
    b: np.ndarray,
    b_scale: np.ndarray,
    block_size: int,
    dtype: str,
    *,
    scale_max_multiple: int = 0,
    shape: Sequence[int | str | None] | None = None,
    fused: bool = True,
) -> ir.Model:
    """DynamicQuantizeW4A8MatMul, or the two ops it stands for; X is float32 for bfloat16, as in `quantize_model`."""
    x, source, nodes = _float_input(dtype, shape)
    initializers = [constant("B", b.astype(ml_dtypes.int4), ir.DataType.INT4), constant("b_scale", b_scale)]
    attributes = {"block_size": block_size, "scale_max_multiple": scale_max_multiple}
    if fused:
        node = ops.dynamic_quantize_w4a8_matmul.dynamic_quantize_w4a8_matmul(
            source, *initializers, **attributes, name="the_node"
        )
    else:
        quantize = ops.dynamic_quantize_per_token.dynamic_quantize_per_token(source, name="quantize")
        nodes.append(_named(quantize, "A", "a_scale"))
        initializers.insert(0, constant("a_zero_point", np.array(128, np.uint8)))
        node = ops.w4a8_matmul.w4a8_matmul(*quantize.outputs, *initializers, **attributes, name="the_node")
    return model_of([*nodes, *_readable(_named(node, "Y"))], [x], initializers)


def _float_input(dtype: str, shape: Sequence[int | str | None] | None) -> tuple[ir.Value, ir.Value, list[ir.Node]]:
    """The graph input X, the value of the type asked for, and the nodes between them."""
    x = value("X", ir.DataType.FLOAT if dtype == "bfloat16" else DTYPES[dtype], shape)
    if dtype != "bfloat16":
        return x, x, []
    cast = _named(ir.node("Cast", [x], attributes={"to": ir.DataType.BFLOAT16.value}), "x_bfloat16")
    cast.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    cast.outputs[0].shape = x.shape
    return x, cast.outputs[0], [cast]


def quantize_model(dtype: str, shape: Sequence[int | str | None] | None = None) -> ir.Model:
    """DynamicQuantizePerToken; the input is float32 for bfloat16, which numpy does not have."""
    x, source, nodes = _float_input(dtype, shape)
    nodes.append(_named(ops.dynamic_quantize_per_token.dynamic_quantize_per_token(source, name="q"), "Y", "scale"))
    return model_of(nodes, [x], [])


def run(
    model: ir.Model | bytes,
    feeds: Mapping[str, np.ndarray],
    *,
    library: bool = True,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    threads: int = 1,
) -> list[Any]:
    """Run a model once on the CPU provider."""
    return open_session(model, library=library, level=level, threads=threads).run(None, dict(feeds))


def open_session(
    model: ir.Model | bytes,
    *,
    library: bool = True,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    threads: int = 1,
    severity: int = 4,
) -> ort.InferenceSession:
    """A session with, or without, the op library; messages below `severity` are not logged."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = level
    options.log_severity_level = severity
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if library:
        options.register_custom_ops_library(library_path())
    data = model if isinstance(model, bytes) else ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def random_problem(
    rng: np.random.Generator, rows: Sequence[int], k: int, n: int, block_size: int, dtype: str
) -> dict[str, Any]:
    """Random operands of a W4A8MatMul."""
    groups = -(-k // block_size)
    return {
        "a": rng.integers(0, 256, (*rows, k), dtype=np.uint8),
        "a_scale": rng.uniform(0.01, 0.1, (*rows, 1)).astype(np.float32),
        "b": rng.integers(-8, 8, (k, n), dtype=np.int8),
        "b_scale": (rng.uniform(0.5, 2.0, (groups, n)) * rng.choice([-1, 1], (groups, n))).astype(NUMPY_DTYPES[dtype]),
    }
