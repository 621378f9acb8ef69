"""Hugging Face model directories to ONNX."""

from __future__ import annotations

__all__ = ["ExportResult", "export_model"]

from fptq_onnx.export.export_model import ExportResult, export_model
