"""Writing and reading a model gives it back: names, types, shapes and every byte, embedded and external."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.graph import model_file
from fptq_onnx.graph.model_file import load_model, save_model

DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.INT64: np.int64,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
    ir.DataType.BOOL: np.bool_,
}
SHAPES = st.one_of(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.sampled_from([(33, 65), (1, 1), (2049,), (1025, 3)]),  # above the size that stays in the model file
)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(st.tuples(st.sampled_from(list(DTYPES)), SHAPES), min_size=1, max_size=5),
    external=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_tensor_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[ir.DataType, tuple[int, ...]]],
    external: bool,
    seed: int,
) -> None:
    folder: Path = tmp_path_factory.mktemp("trip")
    rng = np.random.default_rng(seed)
    arrays = {
        f"w{i}": (dtype, rng.integers(0, 2 if dtype == ir.DataType.BOOL else 8, shape).astype(DTYPES[dtype]))
        for i, (dtype, shape) in enumerate(tensors)
    }
    values = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(dtype),
            shape=ir.Shape(array.shape),
            const_value=ir.Tensor(array, dtype=dtype, name=name),
        )
        for name, (dtype, array) in arrays.items()
    }
    nodes = [ir.node("Identity", [value], name=f"read {name}") for name, value in values.items()]
    for node, (dtype, array) in zip(nodes, arrays.values(), strict=True):
        node.outputs[0].name = f"{node.name} out"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(array.shape)
    graph = ir.Graph(
        [],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=list(values.values()),
        opset_imports={"": 21},
        name="trip",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "EXTERNAL_DATA_THRESHOLD", -1 if external else 2**40)
        save_model(ir.Model(graph, ir_version=10), folder / "first.onnx")
        first = load_model(folder / "first.onnx")
        for name, (dtype, array) in arrays.items():
            tensor = first.graph.initializers[name].const_value
            assert tensor is not None and tensor.dtype == dtype and tuple(tensor.shape) == array.shape
            np.testing.assert_array_equal(tensor.numpy(), array)
        # What was read is written as the same bytes.
        save_model(first, folder / "second.onnx")
    for suffix in ("", ".data"):
        one, two = folder / f"first.onnx{suffix}", folder / f"second.onnx{suffix}"
        assert one.exists() == two.exists()
        if suffix and one.exists():
            assert one.read_bytes() == two.read_bytes()
