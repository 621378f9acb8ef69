"""Small helpers of the graph tests: models from text, running them, folding a scale into a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from fptq_onnx.graph.activation_groups import ActivationGroup
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.graph.producers import ScaleSite, ScaleTarget, find_input_scale


def model_from_text(
    tmp_path: Path, signature: str, body: str, weights: Mapping[str, np.ndarray], header: str = "", tail: str = ""
) -> ir.Model:
    """Parse ONNX text, add initializers, and load the result the way users' files are loaded."""
    imports = header or 'ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]'
    text = f"<{imports}>\nmain {signature} {{\n{body}\n}}\n{tail}"
    tensors = [ir.tensor(array, name=name) for name, array in weights.items()]
    path = tmp_path / "text.onnx"
    ir.save(ir.from_onnx_text(text, initializers=tensors), path)
    return load_model(path)


def run(
    model: ir.Model, feeds: Mapping[str, np.ndarray], tmp_path: Path, extra: Sequence[ir.Value] = ()
) -> dict[str, np.ndarray]:
    """Run a model as it is now; ``extra`` values are given out too."""
    outputs = list(model.graph.outputs)
    added = [value for value in dict.fromkeys(extra) if value not in outputs]
    model.graph.outputs.extend(added)
    try:
        path = tmp_path / "run.onnx"
        save_model(model, path)
    finally:
        del model.graph.outputs[len(outputs) :]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Optimized, DequantizeLinear + MatMul would quantize the activations.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def fold(model: ir.Model, site: ScaleSite, group: ActivationGroup, scale: np.ndarray) -> None:
    """Divide the targets of a site by ``scale`` [K] and multiply the weight rows of the group by it."""
    for target in site.targets:
        _apply(model, target, 1.0 / scale)
    for layer in group.layers:
        rows = find_input_scale(layer)
        assert rows is not None
        _apply(model, rows, scale)


def _apply(model: ir.Model, target: ScaleTarget, factor: np.ndarray) -> None:
    assert target.initializer.const_value is not None
    array = target.initializer.const_value.numpy()
    factors = np.where(target.channels < 0, 1.0, factor[target.channels])
    shape = [1] * array.ndim
    shape[target.axis] = -1
    scaled = (array.astype(np.float32) * factors.reshape(shape)).astype(array.dtype)
    if target.shared:
        copy = _initializer(model, scaled, f"{target.initializer.name}.{target.uses[0].node.name}")
        for node, index in target.uses:
            node.replace_input_with(index, copy)
    else:
        target.initializer.const_value = ir.tensor(scaled, name=target.initializer.name)


def _initializer(model: ir.Model, array: np.ndarray, name: str) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.tensor(array, name=name)
    model.graph.register_initializer(value)
    return value
