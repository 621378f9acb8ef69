"""Exports a Hugging Face model directory to one ONNX file that is checked against torch."""

from __future__ import annotations

__all__ = ["DTYPES", "ExportResult", "export_model"]

import dataclasses
import importlib.util
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from fptq_onnx.errors import ModelError, RuntimeUnavailableError, VerificationError
from fptq_onnx.graph.model_file import save_model
from fptq_onnx.graph.output_files import refuse_overwriting, staged, writing
from fptq_onnx.progress import Progress, SilentProgress

logger = logging.getLogger(__name__)

# Largest accepted difference to torch's results, relative to the largest result.
DTYPES = {"float32": 1e-3, "float16": 5e-2}

# onnxruntime 1.23 implements opset 23; 21 is the first one with 4-bit integers.
_OPSETS = range(21, 24)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export produced.

    Attributes:
        path: The model file.
        architecture: The transformers class, for example "LlamaForCausalLM".
        kind: "decoder" or "encoder".
        dtype: "float32" or "float16".
        kv_cache: Whether the graph takes and returns a key/value cache.
        opset: Version of the default operator set.
        model_bytes: Size of the model file and its external data.
        files: Names of the other files written beside it (tokenizer, configuration).
        largest_error: Largest difference to torch's results, relative to the largest of them; None if unverified.
        seconds: Wall time.
    """

    path: Path
    architecture: str
    kind: str
    dtype: str
    kv_cache: bool
    opset: int
    model_bytes: int
    files: tuple[str, ...]
    largest_error: float | None
    seconds: float


def export_model(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    kv_cache: bool = True,
    dtype: str = "float32",
    opset: int = 21,
    verify: bool = True,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `out_dir`/model.onnx and the tokenizer files beside it.

    Args:
        model_dir: A Hugging Face directory (config.json and weights), or a directory with one GGUF file.
        out_dir: Created where missing; an earlier export in it is replaced, or left as it is where this one fails.
        kv_cache: Whether a decoder takes and returns its key/value cache. Encoders have none.
        dtype: "float32" or "float16".
        opset: 21 to 23.
        verify: Compare the result with torch, decoding through the cache as well.
        progress: Told of each stage; silent by default.

    Raises:
        ModelError: The directory cannot be loaded, the architecture not be exported, or `out_dir` not be written.
        RuntimeUnavailableError: torch, transformers or (to verify) onnxruntime is not installed.
        VerificationError: The exported graph disagrees with torch; nothing of it is left in `out_dir`.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}", "it is not supported", f"Use one of {', '.join(DTYPES)}")
    if opset not in _OPSETS:
        raise ModelError(f"opset {opset}", "it is not supported", f"Use {_OPSETS.start} to {_OPSETS.stop - 1}")
    _require("export", "torch", "transformers")
    if verify:
        _require("cpu", "onnxruntime")
    # torch and transformers take seconds to import and are an extra, so nothing above this line needs them.
    from fptq_onnx.export import pretrained, signatures, tracing, verification

    stage = (progress or SilentProgress()).stage
    out = Path(out_dir)
    path = out / "model.onnx"
    with tracing.quiet():
        with stage("Loading the checkpoint"):
            source = pretrained.load_pretrained(model_dir, dtype)
        with writing(path):
            out.mkdir(parents=True, exist_ok=True)
        with staged(path) as staging:
            with writing(path):
                files = pretrained.save_tokenizer(source, staging.folder)
                made = {name: (staging.folder / name).read_bytes() for name in files}
            _keep_checkpoint(source.directory, out, made)
            is_decoder = source.kind is pretrained.Kind.DECODER
            if is_decoder:
                signature = signatures.decoder_signature(source.model, kv_cache)
            else:
                signature = signatures.encoder_signature(source.model)
            interface = signature.interface
            reference = None
            if verify:
                with stage("Computing reference results with torch"):
                    reference = verification.compute_reference(source.model, interface, is_decoder)
            with stage("Tracing the model"):
                model = tracing.trace(signature, opset)
            architecture, kind = source.architecture, source.kind
            del source, signature  # the graph holds the weights from here on
            with stage("Writing the model"):
                save_model(model, staging.path)
            del model
            largest_error = None
            if reference is not None:
                with stage("Comparing the model with torch"):
                    largest_error = verification.largest_error(staging.path, reference, interface)
                if not largest_error <= DTYPES[dtype]:
                    raise VerificationError(
                        str(path),
                        f"the exported graph differs from torch by {largest_error:.2g} of the largest result"
                        f" (allowed {DTYPES[dtype]:.2g})",
                        "Report the architecture, or export it with its own tools",
                    )
            staging.publish()
    data = path.with_name(path.name + ".data")
    model_bytes = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return ExportResult(
        path=path,
        architecture=architecture,
        kind=str(kind),
        dtype=dtype,
        kv_cache=bool(interface.cache),
        opset=opset,
        model_bytes=model_bytes,
        files=tuple(files),
        largest_error=largest_error,
        seconds=time.perf_counter() - started,
    )


def _keep_checkpoint(checkpoint: Path, out: Path, made: Mapping[str, bytes]) -> None:
    """Refuse companions that would replace other contents in the checkpoint, as transformers writes them anew."""
    theirs = [checkpoint / name for name in made if (checkpoint / name).is_file()]
    changed = [path for path in theirs if path.read_bytes() != made[path.name]]
    refuse_overwriting([out / path.name for path in changed], changed, "this is a file of the checkpoint")


def _require(extra: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise RuntimeUnavailableError(
                module, "export needs this package, and it is not installed", f"pip install 'fptq-onnx[{extra}]'"
            )
