"""The whole examination."""

from __future__ import annotations

__all__ = ["diagnose"]

import os
from collections.abc import Iterator
from pathlib import Path

from fptq_onnx.doctor.environment import check_gpu, check_library, check_runtime
from fptq_onnx.doctor.findings import Diagnosis, Finding
from fptq_onnx.doctor.model import check_model
from fptq_onnx.runtime import Provider


def diagnose(model: str | os.PathLike[str] | None = None, provider: Provider = "cpu") -> Diagnosis:
    """Examine this installation, this machine and, if given, a model.

    Nothing is changed. Libraries and models are tried in processes of their own, so that a crash is a finding.

    Args:
        model: ONNX file to try, or a folder with genai_config.json or model.onnx.
        provider: Where models are to run; what stands in the way of "cuda" is broken only where it is asked for.
    """
    return Diagnosis(tuple(_examine(None if model is None else Path(model), provider)))


def _examine(model: Path | None, provider: Provider) -> Iterator[Finding]:
    runtime, runtime_works = check_runtime(provider)
    yield from runtime
    findings, library = check_library(runtime_works)
    yield from findings
    yield from check_gpu(library, provider)
    if model is not None:
        yield from check_model(model, None if library is None else library.path, provider, runtime_works)
