"""Write a model into a Triton Inference Server model repository."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from fptq_onnx.errors import ModelError, RuntimeUnavailableError
from fptq_onnx.generation.generate import find_model
from fptq_onnx.graph.model_file import data_locations, load_model
from fptq_onnx.graph.output_files import scratch_folder, writing
from fptq_onnx.ops import DOMAIN, get_library_path, library_info
from fptq_onnx.packaging.triton_config import TritonOptions, can_batch, check_schema, render_config, tensors_of

__all__ = ["SERVED_FROM", "TritonPackage", "package_triton"]

SERVED_FROM = "/models"
"""Where the documented server command mounts the repository."""

_IMAGE = "nvcr.io/nvidia/tritonserver:<yy.mm>-py3"
# Folder names that Triton takes, and that need no quoting anywhere.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TritonPackage:
    """What was written.

    Attributes:
        repository: The model repository.
        name: Name of the model.
        files: Files below the repository.
        batched: Whether the server may join requests.
        unbatched_reason: Why not, if it may not; None if it was turned off or is on.
        schema_checked: Whether config.pbtxt was parsed by Triton's schema (needs the extra `triton`).
        server_command: Shell command that serves the repository.
    """

    repository: Path
    name: str
    files: tuple[str, ...]
    batched: bool
    unbatched_reason: str | None
    schema_checked: bool
    server_command: str


def package_triton(
    model: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    options: TritonOptions | None = None,
    served_from: str = SERVED_FROM,
) -> TritonPackage:
    """Add a model to a repository: its files, the op library if it uses it, and config.pbtxt.

    The model's folder appears whole or not at all. Inputs and outputs are those of the graph, so a decoder's cache is
    passed by the client from each response to the next request.

    Args:
        model: The ONNX file, or a folder with genai_config.json or model.onnx; external data are copied too.
        repository: The model repository; it is made if it does not exist.
        name: Name of the model; by default the file's name up to the first dot, or its folder's for "model.onnx".
        options: How the server runs it.
        served_from: Absolute path under which the server sees `repository`; the op library is named by it.

    Raises:
        ModelError: The model cannot be read or described, the name is taken or not usable, or writing failed.
        RuntimeUnavailableError: The model needs the op library, or CUDA kernels in it, and there is none.
    """
    path, folder = find_model(Path(model)), Path(repository)
    options = options or TritonOptions()
    loaded = load_model(path)
    name = name or _default_name(path)
    if not _NAME.fullmatch(name):
        raise ModelError(f"name {name!r}", "holds characters other than A-Z a-z 0-9 . _ -", "Give another with --name")
    if not served_from.startswith("/"):
        raise ModelError(
            f"path {served_from!r}", "is not absolute", "Give the path at which the server sees the folder"
        )
    target = folder / name
    if target.exists():
        raise ModelError(str(target), "is there already", "Remove it, or give another --name")
    inputs = tensors_of([v for v in loaded.graph.inputs if v.name not in loaded.graph.initializers], str(path))
    outputs = tensors_of(loaded.graph.outputs, str(path))
    fixed = [tensor.name for tensor in (*inputs, *outputs) if not can_batch([tensor])]
    reason = f"the first dimension of {fixed[0]} is fixed" if fixed and options.max_batch_size else None
    if fixed:
        options = dataclasses.replace(options, max_batch_size=0)
    library = _library(options) if DOMAIN in loaded.graph.opset_imports else None
    on_server = None if library is None else f"{served_from.rstrip('/')}/{name}/{library.name}"
    config = render_config(name, inputs, outputs, options, on_server)
    checked = check_schema(config, f"{name}/config.pbtxt")
    _write(target, loaded, path, config, library)
    return TritonPackage(
        repository=folder,
        name=name,
        files=tuple(sorted(str(file.relative_to(folder)) for file in target.rglob("*") if file.is_file())),
        batched=options.max_batch_size > 0,
        unbatched_reason=reason,
        schema_checked=checked,
        server_command=_server_command(folder, served_from, options),
    )


def _default_name(path: Path) -> str:
    stem = path.name.split(".")[0]
    return path.absolute().parent.name if stem == "model" and path.absolute().parent.name else stem


def _library(options: TritonOptions) -> Path:
    library = get_library_path()
    if options.provider == "cuda" and library_info().cuda is None:
        raise RuntimeUnavailableError(
            str(library), "it was built without CUDA kernels", "Build it where nvcc is on PATH, or use --provider cpu"
        )
    return library


def _write(target: Path, model: ir.Model, path: Path, config: str, library: Path | None) -> None:
    """Fill a hidden folder beside `target`, then rename it."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target) as building:
            building.chmod(0o755)  # a temporary folder is for its owner alone
            version = building / "1"
            version.mkdir()
            shutil.copyfile(path, version / "model.onnx")
            for location in data_locations(model):
                copy = version / location
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.parent / location, copy)
            if library is not None:
                shutil.copyfile(library, building / library.name)
            (building / "config.pbtxt").write_text(config, encoding="utf-8")
            building.rename(target)


def _server_command(repository: Path, served_from: str, options: TritonOptions) -> str:
    gpus = "--gpus all " if options.provider == "cuda" else ""
    mount = shlex.quote(f"{repository.absolute()}:{served_from}:ro")
    return (
        f"docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -p 8002:8002 -v {mount} {_IMAGE} "
        f"tritonserver --model-repository={shlex.quote(served_from)}"
    )
