"""Whether a model folder of onnxruntime-genai names the op library it needs."""

from __future__ import annotations

__all__ = ["check_genai"]

from collections.abc import Iterator
from pathlib import Path

from fptq_onnx.doctor.findings import Finding, Status
from fptq_onnx.doctor.probe import Probe, run_probe
from fptq_onnx.errors import ModelError
from fptq_onnx.genai.config import CONFIG_NAME, GenaiConfig
from fptq_onnx.ops.inspection import explain_load_failure

_CHECK = "genai folder"


def check_genai(folder: Path, needs_library: bool, runtime_works: bool) -> Iterator[Finding]:
    """Look at genai_config.json, if the folder has one.

    Args:
        folder: Where the model lies.
        needs_library: Whether the model has ops of this package.
        runtime_works: Whether onnxruntime imports; without it no library can be tried.
    """
    if not (folder / CONFIG_NAME).is_file():
        return
    try:
        library = GenaiConfig.load(folder).library
    except ModelError as error:
        yield Finding(_CHECK, Status.BROKEN, f"{error.where}: {error.reason}", error.fix)
        return
    if library is None:
        if needs_library:
            yield Finding(
                _CHECK,
                Status.WARNING,
                f"{CONFIG_NAME} names no custom_ops_library, so onnxruntime_genai runs the function bodies",
                "Convert the folder itself (`fptq-onnx convert FOLDER -o FOLDER`), which adds the library",
            )
        return
    path = folder / library
    if not path.is_file():
        yield Finding(
            _CHECK,
            Status.BROKEN,
            f"{CONFIG_NAME} names the library {library}, which is not in the folder",
            f"Copy it there from {'`fptq_onnx.get_library_path()`' if needs_library else 'where it was built'}",
        )
        return
    if not runtime_works:
        return
    probe = run_probe(Probe(("CPUExecutionProvider",), str(path.absolute())))
    if probe.error is None:
        yield Finding(_CHECK, Status.OK, f"{CONFIG_NAME} registers {library}, which onnxruntime takes")
        return
    reason, fix = explain_load_failure(path, f"{probe.error}\n{probe.log}")
    yield Finding(_CHECK, Status.BROKEN, f"onnxruntime refuses {path}: {reason}", fix)
