"""Benchmark one model, and others beside it: every model in a process of its own, taking turns."""

from __future__ import annotations

__all__ = ["benchmark"]

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from fptq_onnx.benchmark.layers import LayerIndex, index_layers, phase_profile
from fptq_onnx.benchmark.results import (
    BenchmarkReport,
    Case,
    CaseResult,
    Kind,
    MemoryUse,
    ModelResult,
    PhaseProfile,
    Settings,
    Spread,
)
from fptq_onnx.benchmark.worker import Opened, Round, Worker
from fptq_onnx.errors import ModelError
from fptq_onnx.generation.generate import find_model
from fptq_onnx.graph.feeds import ModelInputs, describe_inputs
from fptq_onnx.graph.model_file import load_model, source_files
from fptq_onnx.ops import DOMAIN
from fptq_onnx.progress import Progress, SilentProgress
from fptq_onnx.report import versions
from fptq_onnx.runtime import check_provider

_LENGTHS = (128, 512)
# Threads of a session that just ran still spin for a moment; the next model shall not have to share with them.
_PAUSE = 0.05
_UNKNOWN_VOCABULARY = 256


@dataclass
class _Contender:
    """One model on its way through the benchmark."""

    path: Path
    inputs: ModelInputs
    layers: LayerIndex
    library: bool
    file_bytes: int
    worker: Worker | None = None
    opened: Opened | None = None
    rounds: dict[Case, list[Round]] = field(default_factory=dict)
    cold: Round | None = None
    profile: tuple[PhaseProfile, PhaseProfile | None] | None = None


def benchmark(
    model: str | os.PathLike[str],
    against: Sequence[str | os.PathLike[str]] = (),
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Time a model, alone or against others.

    Each model is opened once in a process of its own. The rounds of a case run through all models before the next
    round, so that what else the machine does meets all of them; ratios are taken round by round.

    Args:
        model: An ONNX file, or a folder with genai_config.json or model.onnx.
        against: Models to compare with, such as the float one and one of MatMulNBits; ratios are to the first.
        settings: What to measure.
        progress: Told of each run.

    Returns:
        The report.

    Raises:
        ModelError: A model cannot be read, opened or does not take the lengths and batches, or its process ended.
        CalibrationError: An input of a model does not follow from token ids, or running it failed.
        RuntimeUnavailableError: The provider or the op library is missing.
    """
    settings = settings or Settings()
    progress = progress or SilentProgress()
    contenders = [_read(find_model(Path(path)), settings) for path in (model, *against)]
    check_provider(settings.provider, register_library=any(contender.library for contender in contenders))
    cases = _cases(settings, contenders)
    vocabulary = min(contender.inputs.vocabulary or _UNKNOWN_VOCABULARY for contender in contenders)
    with ExitStack() as stack:
        with progress.stage("Opening", len(contenders)) as advance:
            for contender in contenders:
                worker = Worker(contender.path, contender.inputs, contender.library, settings)
                contender.worker = stack.enter_context(worker)
                contender.opened = worker.open()
                advance(1)
        _check_kinds(contenders)
        repeats = settings.warmup + settings.rounds
        with progress.stage("Timing", len(cases) * repeats * len(contenders)) as advance:
            for case in cases:
                for repeat in range(repeats):
                    for contender in contenders:
                        assert contender.worker is not None
                        done = contender.worker.run(case, vocabulary)
                        contender.cold = contender.cold or done
                        if repeat >= settings.warmup:
                            contender.rounds.setdefault(case, []).append(done)
                        time.sleep(_PAUSE)
                        advance(1)
        if settings.profile:
            smallest = min(cases, key=lambda case: case.batch * case.length)
            with progress.stage("Profiling", len(contenders)) as advance:
                for contender in contenders:
                    _profile(contender, smallest, vocabulary, contenders, settings)
                    advance(1)
    return BenchmarkReport(
        models=tuple(_result(contender, contenders, cases) for contender in contenders),
        settings=replace(
            settings,
            lengths=tuple(dict.fromkeys(case.length for case in cases)),
            batches=tuple(dict.fromkeys(case.batch for case in cases)),
        ),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions=versions(),
    )


def _read(path: Path, settings: Settings) -> _Contender:
    model = load_model(path)
    inputs = describe_inputs(model)
    if inputs.token_input is None:
        raise ModelError(
            f"{path}, inputs {', '.join(inputs.names)}",
            "none of them takes token ids",
            "Benchmark language models and text encoders, with an input such as input_ids",
        )
    return _Contender(
        path=path,
        inputs=inputs,
        layers=index_layers(model, path),
        library=settings.library and DOMAIN in model.graph.opset_imports,
        file_bytes=sum(file.stat().st_size for file in source_files(model)),
    )


def _cases(settings: Settings, contenders: Sequence[_Contender]) -> list[Case]:
    """The shapes to run: those asked for, if every model takes them, else what all of them take."""
    for contender in contenders:
        for option, name, flag, fixed in (
            (settings.lengths, "length", "--lengths", contender.inputs.sequence_length),
            (settings.batches, "batch", "--batches", contender.inputs.batch_size),
        ):
            wrong = [size for size in option or () if fixed is not None and size != fixed]
            if wrong:
                raise ModelError(
                    str(contender.path),
                    f"its {name} is fixed to {fixed}, not {wrong[0]}",
                    f"Use {flag} {fixed}, or export the model with a dynamic {name}",
                )
    decodes = any(contender.inputs.caches for contender in contenders)
    steps = settings.new_tokens if decodes else 0
    limits = [c.inputs.positions - steps for c in contenders if c.inputs.positions is not None]
    limit = min(limits, default=None)
    fixed_lengths = [c.inputs.sequence_length for c in contenders if c.inputs.sequence_length is not None]
    lengths = settings.lengths or (tuple(fixed_lengths[:1]) if fixed_lengths else _LENGTHS)
    if limit is not None and settings.lengths is None:
        lengths = tuple(length for length in lengths if length <= limit) or (limit,)
    if limit is not None and (max(lengths) > limit or limit < 1):
        shortest = min((c for c in contenders if c.inputs.positions is not None), key=lambda c: c.inputs.positions or 0)
        raise ModelError(
            str(shortest.path),
            f"has {shortest.inputs.positions} positions, too few for {max(*lengths, 1)} tokens and {steps} new ones",
            "Use shorter --lengths or fewer --new-tokens",
        )
    batches = settings.batches or (next((c.inputs.batch_size for c in contenders if c.inputs.batch_size), 1),)
    return [Case(batch, length, steps) for length in lengths for batch in batches]


def _check_kinds(contenders: Sequence[_Contender]) -> None:
    """Refuse to compare the speed of an encoder with that of a decoder."""
    kinds = {(c.opened.kind is Kind.ENCODER) for c in contenders if c.opened is not None}
    if len(kinds) > 1:
        encoder = next(c for c in contenders if c.opened is not None and c.opened.kind is Kind.ENCODER)
        raise ModelError(
            str(encoder.path), "is an encoder, and another model is a decoder", "Compare models of one kind"
        )


def _profile(
    contender: _Contender, case: Case, vocabulary: int, contenders: Sequence[_Contender], settings: Settings
) -> None:
    assert contender.worker is not None
    runs = contender.worker.profile(case, vocabulary)
    others: dict[str, str] = {}
    for other in reversed(contenders):
        others |= dict(other.layers.labels)
    grouped = [
        phase_profile(phase, contender.layers, others, settings.provider)
        for phase in (runs.prefill, runs.decode)
        if phase is not None
    ]
    contender.profile = (grouped[0], grouped[1] if len(grouped) > 1 else None)


def _result(contender: _Contender, contenders: Sequence[_Contender], cases: Sequence[Case]) -> ModelResult:
    opened, cold = contender.opened, contender.cold
    assert opened is not None and cold is not None
    reference = contenders[1] if len(contenders) > 1 and contender is not contenders[1] else None
    peaks = [opened.memory, *(done.memory for rounds in contender.rounds.values() for done in rounds)]
    smallest = min(cases, key=lambda case: case.batch * case.length)
    return ModelResult(
        path=str(contender.path),
        kind=opened.kind,
        note=_note(opened.kind),
        providers=opened.providers,
        library=contender.library,
        file_bytes=contender.file_bytes,
        load_seconds=opened.load_seconds,
        cold_first_token_ms=1e3 * cold.timing.first_token_seconds,
        memory=_largest(peaks),
        cases=tuple(_case_result(case, opened.kind, contender.rounds, reference) for case in cases),
        profile_case=None if contender.profile is None else smallest,
        prefill_profile=None if contender.profile is None else contender.profile[0],
        decode_profile=None if contender.profile is None else contender.profile[1],
    )


def _note(kind: Kind) -> str | None:
    if kind is Kind.DECODER_WITHOUT_CACHE:
        return "no key/value cache: prefill only (export with a cache to decode)"
    return None


def _case_result(
    case: Case, kind: Kind, rounds: Mapping[Case, Sequence[Round]], reference: _Contender | None
) -> CaseResult:
    timings = [done.timing for done in rounds[case]]
    theirs = [] if reference is None else [done.timing for done in reference.rounds[case]]
    tokens, steps = case.batch * case.length, case.new_tokens
    decoded = [t.decode_seconds for t in timings] if kind is Kind.DECODER and steps else []
    decoded_by_reference = [t.decode_seconds for t in theirs] if decoded else []
    return CaseResult(
        case=case,
        prefill=Spread.of([tokens / t.prefill_seconds for t in timings]),
        sequences=Spread.of([case.batch / t.prefill_seconds for t in timings]) if kind is Kind.ENCODER else None,
        first_token_ms=None if kind is Kind.ENCODER else Spread.of([1e3 * t.first_token_seconds for t in timings]),
        decode=Spread.of([case.batch * steps / seconds for seconds in decoded]) if decoded else None,
        step_ms=Spread.of([1e3 * seconds / steps for seconds in decoded]) if decoded else None,
        memory=_largest([done.memory for done in rounds[case]]),
        prefill_ratio=_ratio([t.prefill_seconds for t in timings], [t.prefill_seconds for t in theirs]),
        decode_ratio=_ratio(decoded, decoded_by_reference),
    )


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Speed of ours over theirs, round by round; None where one of them was not measured."""
    if not ours or not theirs or not all(theirs):
        return None
    return Spread.of([reference / own for own, reference in zip(ours, theirs, strict=True)])


def _largest(uses: Sequence[MemoryUse]) -> MemoryUse:
    return MemoryUse(
        max(use.process_bytes for use in uses),
        uses[0].before_bytes,
        max((use.gpu_bytes for use in uses if use.gpu_bytes is not None), default=None),
    )
