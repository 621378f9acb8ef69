"""Whether one model loads and runs here, with the op library and without it."""

from __future__ import annotations

__all__ = ["check_model"]

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fptq_onnx.calibration.tokens import find_tokenizer, load_tokenizer
from fptq_onnx.doctor.explain import explain_cuda_log, explain_session_error
from fptq_onnx.doctor.findings import Finding, Status
from fptq_onnx.doctor.genai import check_genai
from fptq_onnx.doctor.probe import Probe, ProbeResult, run_probe
from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.generation.generate import find_model
from fptq_onnx.graph.feeds import Feeds, ModelInputs, describe_inputs
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.ops import DOMAIN
from fptq_onnx.runtime import PROVIDERS, Provider

_KNOWN_DOMAINS = frozenset(
    {
        "",
        "ai.onnx",
        "ai.onnx.ml",
        "ai.onnx.training",
        "ai.onnx.preview.training",
        "com.microsoft",
        "com.microsoft.nchwc",
        "com.ms.internal.nhwc",
        DOMAIN,
    }
)
_LENGTH = 4
_CUDA = "CUDAExecutionProvider"


def check_model(path: Path, library: Path | None, provider: Provider, runtime_works: bool) -> Iterator[Finding]:
    """Look at a model file and try it.

    Args:
        path: The file, or a folder with genai_config.json or model.onnx.
        library: The op library; None if it does not load.
        provider: Where the model is to run.
        runtime_works: Whether onnxruntime imports.
    """
    try:
        path = find_model(path)
        model = load_model(path)
    except ModelError as error:
        yield Finding("model", Status.BROKEN, f"{error.where}: {error.reason}", error.fix)
        return
    used = sorted({node.domain for node in model.graph})
    opsets = ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in model.opset_imports.items())
    yield Finding("model", Status.OK, f"{path}: IR version {model.ir_version}, opsets {opsets}")
    functions = {(domain, name) for domain, name, _ in model.functions}
    unknown = [domain for domain in used if domain not in _KNOWN_DOMAINS and not any(domain == d for d, _ in functions)]
    if unknown:
        yield Finding(
            "operators",
            Status.WARNING,
            f"the domain {unknown[0]} belongs neither to onnxruntime nor to this package",
            f"Register the library that defines {unknown[0]} before opening the model",
        )
    ours = {(node.domain, node.op_type) for node in model.graph if node.domain == DOMAIN}
    if ours - functions:
        yield Finding(
            "function bodies",
            Status.WARNING,
            f"there is none for {', '.join(sorted(op for _, op in ours - functions))}: the model needs the op library",
            "Convert it again, or ship libfptq_ops with it (a file saved by onnxruntime's optimizer loses its bodies)",
        )
    inputs = describe_inputs(model)
    yield from _check_tokenizer(path, inputs)
    yield from check_genai(path.absolute().parent, bool(ours), runtime_works)
    if runtime_works:
        yield from _check_sessions(path, model, inputs, bool(ours), library, provider)


def _check_tokenizer(path: Path, inputs: ModelInputs) -> Iterator[Finding]:
    if inputs.token_input is None:
        return
    found = find_tokenizer(path)
    if found is None:
        yield Finding(
            "tokenizer",
            Status.WARNING,
            f"there is no tokenizer.json beside {path.name}",
            "Copy it from the original model's folder, or name it with --tokenizer",
        )
        return
    try:
        size = load_tokenizer(found).get_vocab_size()
    except CalibrationError as error:
        yield Finding("tokenizer", Status.BROKEN, f"{found}: {error.reason}", error.fix)
        return
    if inputs.vocabulary is not None and size > inputs.vocabulary:
        yield Finding(
            "tokenizer",
            Status.BROKEN,
            f"{found} has {size} tokens, more than the {inputs.vocabulary} rows of the embedding",
            "Use the tokenizer that belongs to the model",
        )
    else:
        yield Finding("tokenizer", Status.OK, f"{found}, {size} tokens")


def _check_sessions(
    path: Path, model: ir.Model, inputs: ModelInputs, custom: bool, library: Path | None, provider: Provider
) -> Iterator[Finding]:
    feeds, reason = _feeds(inputs)
    if feeds is None:
        yield Finding("run", Status.NOTE, f"the model is opened but not run: {reason}")
    with tempfile.TemporaryDirectory(prefix="fptq-onnx-") as folder:
        saved = None
        if feeds is not None:
            saved = str(Path(folder) / "feeds.npz")
            np.savez(saved, **feeds)  # type: ignore[arg-type]
        attempts: list[tuple[str, str | None]] = [("without the op library" if custom else "session", None)]
        if custom and library is not None:
            attempts.insert(0, ("with the op library", str(library)))
        works = False
        for title, registered in attempts:
            probe = Probe(tuple(PROVIDERS[provider]), registered, str(path.absolute()), saved)
            # A model that needs the library and has it is not broken.
            failure = Status.WARNING if works else Status.BROKEN
            findings = list(_judge(title, run_probe(probe), provider, failure))
            works = works or all(finding.status is not Status.BROKEN for finding in findings)
            yield from findings


def _judge(title: str, result: ProbeResult, provider: Provider, failure: Status) -> Iterator[Finding]:
    if result.error is not None:
        reason, fix = explain_session_error(result.error)
        yield Finding(title, failure, f"the model does not {result.stage}: {reason}", fix)
        return
    if provider == "cuda" and _CUDA not in result.providers:
        reason, fix = explain_cuda_log(result.log)
        yield Finding(title, Status.BROKEN, f"onnxruntime fell back to the CPU silently: {reason}", fix)
        return
    if not result.finite:
        yield Finding(title, Status.BROKEN, "the outputs hold NaN or infinity", "Convert it again, or try float32")
        return
    where = ", ".join(
        f"{count} nodes on {name.removesuffix('ExecutionProvider')}" for name, count in result.nodes.items()
    )
    left = result.nodes.get("CPUExecutionProvider", 0) if provider == "cuda" else 0
    yield Finding(title, Status.OK, f"the model opens and runs ({where})" if where else "the model opens")
    if left and len(result.nodes) > 1:
        yield Finding(
            title, Status.NOTE, f"{left} nodes run on the CPU, where CUDA has no kernel or shapes are computed"
        )


def _feeds(inputs: ModelInputs) -> tuple[Feeds | None, str]:
    """A few tokens, or the reason why none can be fed."""
    if inputs.token_input is None:
        return None, f"its inputs ({', '.join(inputs.names)}) take no token ids"
    token_ids = np.zeros((inputs.batch_size or 1, inputs.window(_LENGTH)), np.int64)
    try:
        feeds = inputs.feeds(token_ids)
    except CalibrationError as error:
        return None, f"{error.where} {error.reason}"
    strange = next((name for name, array in feeds.items() if array.dtype.kind not in "biuf"), None)
    return (None, f"input {strange} has a type that numpy cannot store") if strange else (feeds, "")
