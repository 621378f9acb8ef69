"""The small sound model that every bad input is made from: token ids, embedding, one residual block, logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["HIDDEN", "INNER", "VOCABULARY", "model", "nodes", "save", "value_info", "weights"]

VOCABULARY, HIDDEN, INNER = 67, 32, 48


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Initializers by name; none is small enough to be embedded in a model with external data."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCABULARY, HIDDEN), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
    arrays = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"head": np.ascontiguousarray(arrays["embed"].T)}


def nodes(up: str = "up", down: str = "down") -> list[onnx.NodeProto]:
    """The graph from `input_ids` to `logits`."""
    return [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"], name="embedding"),
        helper.make_node("MatMul", ["x", up], ["u"], name="up_proj"),
        helper.make_node("Tanh", ["u"], ["t"], name="activation"),
        helper.make_node("MatMul", ["t", down], ["d"], name="down_proj"),
        helper.make_node("Add", ["x", "d"], ["h"], name="residual"),
        helper.make_node("MatMul", ["h", "head"], ["logits"], name="lm_head"),
    ]


def value_info(name: str, shape: Sequence[int | str] | None, dtype: int = onnx.TensorProto.FLOAT) -> Any:
    """Declaration of a graph input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    arrays: Mapping[str, np.ndarray] | None = None,
    graph_nodes: Sequence[onnx.NodeProto] | None = None,
    *,
    opsets: Mapping[str, int] | None = None,
    ir_version: int = 10,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    """A model that need not be valid: nothing here is checked."""
    graph = helper.make_graph(
        nodes() if graph_nodes is None else graph_nodes,
        "hostile",
        inputs or [value_info("input_ids", ["batch", "sequence"], onnx.TensorProto.INT64)],
        [value_info("logits", ["batch", "sequence", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in (weights() if arrays is None else arrays).items()],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": 21}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="hostile")


def save(proto: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model; `external` puts every initializer into `<name>.data` beside it."""
    if external:
        onnx.save_model(
            proto,
            path,
            save_as_external_data=True,
            location=path.name + ".data",
            size_threshold=0,
        )
    else:
        path.write_bytes(proto.SerializeToString())
    return path
