"""Convert a model folder of onnxruntime-genai into one that onnxruntime-genai loads unchanged."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from fptq_onnx.errors import ModelError, VerificationError
from fptq_onnx.genai.config import CONFIG_NAME, GenaiConfig
from fptq_onnx.graph.model_file import load_model, source_files
from fptq_onnx.graph.output_files import scratch_folder, writing
from fptq_onnx.ops import get_library_path
from fptq_onnx.report import Report

__all__ = ["accepting_folders", "convert_folder", "default_folder"]

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Convert = TypeVar("Convert", bound=Callable[..., Report])


def accepting_folders(convert: Convert) -> Convert:
    """Let a conversion of model files also take a folder of onnxruntime-genai, with the same options."""

    @wraps(convert)
    def convert_either(model: PathLike, output: PathLike | None = None, **options: Any) -> Report:
        if Path(model).is_dir():
            return convert_folder(Path(model), None if output is None else Path(output), convert, **options)
        return convert(model, output, **options)

    return cast(Convert, convert_either)


def default_folder(folder: Path) -> Path:
    """Return where a converted folder goes by default: `smollm2` -> `smollm2.fptq`."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.fptq")


def convert_folder(source: Path, target: Path | None, convert: Callable[..., Report], **options: Any) -> Report:
    """Write a folder with the converted decoder, the op library, and everything else as it was.

    The decoder keeps its file name, its report lies beside it, and genai_config.json names the library in
    `model.decoder.session_options.custom_ops_library`, which onnxruntime-genai looks for in the folder. Other models
    of the folder (vision, speech, embedding) are copied as they are. The folder appears whole or not at all.

    Args:
        source: A folder with genai_config.json.
        target: The folder to write, missing or empty; `<source>.fptq` if None.
        convert: Converts a model file: called with model, output and `options`.
        options: For `convert`. With `dry_run` only `<target>.plan.json` is written, beside `target`.

    Returns:
        The report of the decoder, its paths those of the two folders.

    Raises:
        ModelError: The folder or its configuration cannot be handled, or `target` cannot be written.
        FptqError: Whatever `convert` raises. After a VerificationError the folder is there, as with a model file.
    """
    config = GenaiConfig.load(source)
    decoder = source / config.filename
    final = target if target is not None else default_folder(source)
    place = final.absolute()
    custom = options.get("output_format", "custom") == "custom"
    _check(source, final, config, decoder, custom)
    if options.get("dry_run"):
        return convert(decoder, place.with_name(f"{place.name}.onnx"), **options)
    library = get_library_path() if custom else None
    kept = _companions(source, decoder)
    missed: VerificationError | None = None
    with scratch_folder(place) as work:
        output = work / config.filename
        with writing(final):
            output.parent.mkdir(parents=True, exist_ok=True)
        try:
            report = convert(decoder, output, **options)
        except VerificationError as error:
            if not isinstance(error.report, Report):
                raise
            report, missed = error.report, error
        report = dataclasses.replace(report, output=str(final / config.filename))
        with writing(final):
            for path in kept:
                copy = work / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
            if library is not None:
                shutil.copy2(library, work / library.name)
                config = config.with_library(library.name)
            config.save(work)
            output.with_suffix(".json").write_text(report.to_json(), encoding="utf-8")
            work.chmod(0o755)  # a temporary folder is for its owner alone
            os.replace(work, place)
    logger.info("copied %d files beside the converted decoder", len(kept))
    if missed is not None:
        raise VerificationError(str(final), missed.reason, missed.fix, report)
    return report


def _check(source: Path, final: Path, config: GenaiConfig, decoder: Path, custom: bool) -> None:
    """Refuse before the long work what could only fail after it."""
    if not decoder.is_file():
        raise ModelError(str(config.path), f"names {config.filename}, which is not there", "Build the folder again")
    if custom and config.library is not None:
        raise ModelError(
            str(config.path),
            f"already loads {config.library}, and onnxruntime-genai takes one library of custom ops",
            "Remove custom_ops_library if the model does not need it, or use --format matmulnbits",
        )
    inner, outer = final.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise ModelError(str(final), "lies in the folder that is converted", "Choose another output folder")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ModelError(str(final), "is there already and not an empty folder", "Remove it or choose another one")


def _companions(folder: Path, decoder: Path) -> list[Path]:
    """All files of a model folder but the configuration, the decoder, and data that no other model reads."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CONFIG_NAME]
    models = [path for path in files if path.suffix == ".onnx" and path != decoder]
    needed = set().union(*(source_files(load_model(path)) for path in models))
    replaced = source_files(load_model(decoder)) - needed
    return [path for path in files if path.resolve() not in replaced]
