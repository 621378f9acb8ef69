"""onnxruntime sessions with the op library."""

from __future__ import annotations

__all__ = ["PROVIDERS", "Provider", "check_provider", "session"]

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast, get_args

import onnx_ir as ir

from fptq_onnx.errors import ModelError, RuntimeUnavailableError
from fptq_onnx.ops.inspection import explain_load_failure
from fptq_onnx.ops.library import get_library_path, library_info

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda"]

PROVIDERS: dict[Provider, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}


def session(
    model: str | os.PathLike[str] | ir.Model,
    provider: Provider = "cpu",
    *,
    register_library: bool = True,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model in onnxruntime.

    Args:
        model: Path of an ONNX file, or a model in memory (written to a temporary file for the time of loading).
        provider: "cpu" or "cuda". "cuda" never falls back to the CPU silently: it is an error where the provider, a
            GPU or a library with CUDA kernels is missing. (An operator that CUDA has no kernel for still runs on the
            CPU, as onnxruntime decides.)
        register_library: Use the kernels of the op library; without it the ops run through their function bodies.
        threads: Intra-op threads, None for onnxruntime's choice.
        config: Session configuration entries, e.g. ``{"session.qdq_matmulnbits_accuracy_level": "0"}``.
        profile: Start of the path of onnxruntime's profile, which ``end_profiling`` writes; None for no profile.

    Returns:
        The session.

    Raises:
        RuntimeUnavailableError: onnxruntime, the provider or the op library is missing.
        ModelError: The file is missing or onnxruntime rejects it.
    """
    ort = _import_onnxruntime()
    if provider not in get_args(Provider):
        raise RuntimeUnavailableError(f"provider {provider!r}", "it is unknown", "Use 'cpu' or 'cuda'")
    if provider == "cuda":
        _require_cuda(ort, register_library)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if register_library:
        library = get_library_path()
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise RuntimeUnavailableError(str(library), *explain_load_failure(library, str(error))) from error

    if isinstance(model, ir.Model):
        with tempfile.TemporaryDirectory(prefix="fptq-onnx-") as folder:
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
            opened = _open(ort, path, model.graph.name or "model in memory", options, provider)
    else:
        path = Path(model)
        if not path.is_file():
            raise ModelError(str(path), "there is no such file", "Check the path")
        opened = _open(ort, path, str(path), options, provider)
    return opened


def check_provider(provider: Provider, *, register_library: bool) -> None:
    """Find out before long work whether sessions can be opened.

    Raises:
        RuntimeUnavailableError: onnxruntime, the provider or (if it is to be registered) the op library is missing.
    """
    ort = _import_onnxruntime()
    if register_library:
        get_library_path()
    if provider == "cuda":
        _require_cuda(ort, register_library)


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeUnavailableError(
            "onnxruntime", "it is not installed", "Run `pip install fptq-onnx[cpu]` or `pip install fptq-onnx[gpu]`"
        ) from error
    return cast(ModuleType, ort)


def _require_cuda(ort: ModuleType, register_library: bool) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise RuntimeUnavailableError(
            "provider 'cuda'",
            f"this onnxruntime ({ort.__version__}) has no CUDA execution provider",
            "Install onnxruntime-gpu instead of onnxruntime, or use provider 'cpu'",
        )
    if register_library and library_info().cuda is None:
        raise RuntimeUnavailableError(
            "provider 'cuda'",
            f"{get_library_path()} was built without CUDA kernels",
            "Build it where nvcc is on PATH (-DFPTQ_CUDA=ON), or use provider 'cpu'",
        )


def _open(
    ort: ModuleType, path: Path, where: str, options: onnxruntime.SessionOptions, provider: Provider
) -> onnxruntime.InferenceSession:
    providers = PROVIDERS[provider]
    try:
        opened = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ModelError(
            where, f"onnxruntime {ort.__version__} cannot open it ({error})", "See the reason given by onnxruntime"
        ) from error
    if providers[0] not in opened.get_providers():
        raise RuntimeUnavailableError(
            f"provider {provider!r}",
            f"onnxruntime could not start {providers[0]} and fell back to {', '.join(opened.get_providers())}",
            "Check the GPU driver and the CUDA libraries (onnxruntime's log names what is missing)",
        )
    logger.debug("opened %s on %s", where, ", ".join(opened.get_providers()))
    return cast("onnxruntime.InferenceSession", opened)
