"""Quantize ONNX transformers to W4A8 (FPTQ) and run them with integer kernels in onnxruntime."""

from __future__ import annotations

__all__ = [
    "FptqError",
    "Plan",
    "Recipe",
    "Report",
    "__version__",
    "analyze",
    "convert",
    "get_cmake_dir",
    "get_library_path",
    "session",
]

from importlib import metadata as _metadata

from fptq_onnx.analysis.analyze import analyze
from fptq_onnx.convert import convert
from fptq_onnx.errors import FptqError
from fptq_onnx.ops import get_cmake_dir, get_library_path
from fptq_onnx.quantization.plan import Plan
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report
from fptq_onnx.runtime import session

try:
    __version__ = _metadata.version("fptq-onnx")
except _metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
