"""Small helpers of the graph tests: models from text, running them, folding a scale into a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from fptq_onnx.graph.activation_groups import ActivationGroup
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.passes.apply_equalization import ApplyEqualizationPass


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
        for _ in added:  # deleting a slice would leave the values marked as outputs
            model.graph.outputs.pop()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Optimized, DequantizeLinear + MatMul would quantize the activations.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def fold(model: ir.Model, group: ActivationGroup, scale: np.ndarray) -> None:
    """Divide the group's activation by ``scale`` [K] and multiply the weight rows of the group by it."""
    ApplyEqualizationPass({str(group.activation.name): scale})(model)
