"""The custom operators: their meaning, function bodies, node builders and compiled library."""

from __future__ import annotations

__all__ = [
    "BODY_OPSET",
    "DOMAIN",
    "VERSION",
    "LibraryInfo",
    "dynamic_quantize_per_token",
    "dynamic_quantize_w4a8_matmul",
    "fused_quantize",
    "get_cmake_dir",
    "get_library_path",
    "group_query_attention",
    "library_info",
    "w4a8_matmul",
    "w8a8_matmul",
]

from fptq_onnx.ops import (
    dynamic_quantize_per_token,
    dynamic_quantize_w4a8_matmul,
    fused_quantize,
    group_query_attention,
    w4a8_matmul,
    w8a8_matmul,
)
from fptq_onnx.ops.domain import BODY_OPSET, DOMAIN, VERSION
from fptq_onnx.ops.library import LibraryInfo, get_cmake_dir, get_library_path, library_info
