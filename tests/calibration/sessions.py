"""The session that tests of calibration observe models in."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime

from fptq_onnx.calibration.memory_session import memory_session


def unfused_session(model: ir.Model) -> onnxruntime.InferenceSession:
    """One whose kernels do not depend on what else the model reads or returns."""

    def configure(options: onnxruntime.SessionOptions) -> None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    return memory_session(model, threads=1, configure=configure)
