"""The main job: a float ONNX transformer in, a verified W4A8 one and a report out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from fptq_onnx.calibration.calibration import Calibration
from fptq_onnx.calibration.tokens import find_tokenizer
from fptq_onnx.errors import ModelError, NothingQuantizedError, RecipeError, VerificationError
from fptq_onnx.genai.folder import accepting_folders
from fptq_onnx.graph.activation_groups import ActivationGroup, group_by_activation
from fptq_onnx.graph.linears import LinearSearch, find_linears
from fptq_onnx.graph.model_file import load_model, save_model, source_files
from fptq_onnx.graph.opset import ensure_opset
from fptq_onnx.graph.output_files import refuse_overwriting, staged, write_text
from fptq_onnx.graph.segments import find_segments
from fptq_onnx.planning import decide_groups, make_plan, observed_groups, step_errors
from fptq_onnx.progress import Progress, SilentProgress
from fptq_onnx.quantization.fallback import fall_back, keep_float
from fptq_onnx.quantization.plan import Plan
from fptq_onnx.quantizing import equalize, quantize_layers, rotate
from fptq_onnx.recipe import FallbackRecipe, Recipe
from fptq_onnx.report import Report, Stopwatch, is_report, peak_memory_bytes, versions
from fptq_onnx.reporting import complete_layers, start_report, stored_bytes, why_nothing
from fptq_onnx.resources import Budget, estimate
from fptq_onnx.rewriting import PASSES, Format, rewrite
from fptq_onnx.runtime import PROVIDERS, Provider, check_provider
from fptq_onnx.storage.fingerprint import file_fingerprint
from fptq_onnx.storage.next_round import keep_next_plan, next_plan
from fptq_onnx.storage.workspace import workspace
from fptq_onnx.verification import Comparison

__all__ = ["Format", "convert", "default_output"]

logger = logging.getLogger(__name__)

RECIPE_KEY = "fptq.recipe"
# Aim below the allowed divergence: errors do not add up exactly.
_FALLBACK_MARGIN = 0.8
_PATH = (str, os.PathLike)


def default_output(model: Path) -> Path:
    """Return where `convert` writes by default: `model.onnx` -> `model.fptq.onnx`."""
    return model.with_name(f"{model.stem}.fptq.onnx")


@accepting_folders
def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    tokenizer: str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] = "balanced",
    output_format: Format = "custom",
    exclude: Sequence[str] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
    fuse: bool = False,
    dry_run: bool = False,
    verify_tokens: int = 2048,
    max_kl: float | None = None,
    provider: Provider = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a float ONNX transformer to int4 weights and int8 activations (FPTQ, arXiv 2308.15987).

    The input file is never changed. The output appears whole or not at all; its report lies beside it.

    Args:
        model: The float model, or a model folder of onnxruntime-genai.
        output: Where to write the quantized model; `model.fptq.onnx` beside the input by default. For a folder the
            folder to write, see `fptq_onnx.genai.folder.convert_folder`.
        calibration: A text file (needs a tokenizer), an .npz file of feeds, an onnxruntime CalibrationDataReader, an
            iterable of feeds, or None for random tokens (data-free, FPTQ).
        tokenizer: tokenizer.json for a text; the one beside the model by default.
        recipe: A Recipe, the name of one that comes with the package, or the path of a YAML file.
        output_format: "custom" (this package's op with function bodies), "matmulnbits" (onnxruntime's int4 op with
            float activations), "qdq" (the same rounding simulated in standard operators).
        exclude: Regular expressions; layers whose label or node name they match stay float, on top of the recipe's.
        plan: An edited plan (or its path) whose decisions replace those of the recipe and of `exclude`.
        fuse: Put norms and SiLU into one op with the quantization behind them, see `FuseQuantizePass`: faster on
            CPU and CUDA. Put other per-token quantizations into one op with the layer behind them, see
            `FuseDynamicMatMulPass`. Replace onnxruntime's attention in float32 graphs, which are for the CPU, see
            `FuseAttentionPass`.
        dry_run: Calibrate and plan only; write `<output>.plan.json` and no model.
        verify_tokens: Tokens of the calibration data to compare the saved model with the float one on; 0 skips it.
        max_kl: Largest mean KL divergence in nats per token; overrides the recipe's.
        provider: Where calibration and verification run.
        threads: Threads of each session, onnxruntime's choice if None. The result is the same.
        max_memory: Bytes, or a text such as "8GiB"; four fifths of what is free by default. Calibration and
            quantization hold the weights of one decoder block at a time whatever it is; what else grows with the model
            (hidden states, results) goes to disk beside the output if it would take more than a quarter each, and the
            verification runs block by block if the float model would not fit.
        work_dir: Keep finished blocks here, so that the same call goes on after a stop, a crash or a kill, with the
            same bytes as result. Removed when the conversion is done.
        stop: Asked after each block whether to stop there; does nothing without a work directory.
        progress: Told of the stages.

    Returns:
        The report, as written to `<output stem>.json`.

    Raises:
        ModelError: The model is broken or cannot be handled.
        RecipeError: The recipe or plan does not fit.
        CalibrationError: The data do not fit the model.
        NothingQuantizedError: No layer was quantized; nothing was written.
        VerificationError: The result was written but misses `max_kl`; `error.report` holds the report.
        RuntimeUnavailableError: onnxruntime, the provider or the op library is missing.
        WorkDirError: The work directory belongs to another conversion or cannot be used.
        StoppedError: `stop` said so; the same call goes on.
    """
    source = Path(model)
    target = Path(output) if output is not None else default_output(source)
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(os.fspath(recipe))
    if exclude:
        settings = settings.with_overrides({"layers.exclude": [*settings.layers.exclude, *exclude]})
    edited = plan if isinstance(plan, Plan) or plan is None else Plan.load(os.fspath(plan))
    limit = max_kl if max_kl is not None else settings.verification.max_kl
    others = (calibration, tokenizer, plan, settings.source)
    read = [source, *(Path(os.fspath(p)) for p in others if isinstance(p, _PATH))]
    _check_request(target, output_format, fuse, limit, verify_tokens, settings.fallback.rounds)
    _check_output(target, dry_run, [*read, *_beside(source)])
    check_provider(provider, register_library=output_format == "custom" and verify_tokens > 0)
    watch, progress, budget = Stopwatch(), progress or SilentProgress(), Budget.of(max_memory)
    data = Calibration(
        calibration,
        source,
        tokenizer,
        settings,
        providers=PROVIDERS[provider],
        threads=threads,
        moments_bytes=min(budget.share, int(settings.calibration.moments_gib * 2**30)),
        progress=progress,
        stop=stop,
    )
    with watch.stage("load"):
        graph = _Graph.load(source)
        used = source_files(graph.model)
        refuse_overwriting((target, Path(f"{target}.data")), used)
        rotation = rotate(graph.model, settings)
        if rotation:
            graph = _Graph.find(graph.model, source)
        data.open(graph.model)
        if edited is not None:
            edited.fit(make_plan(graph.linears.layers, (), settings))
        segments = find_segments(graph.model, graph.linears)
        expected = estimate(graph.model, segments, graph.linears.layers, settings, data.size()[1])
    on_disk = work_dir is not None or expected.on_disk(budget)
    progress.note(expected.describe(budget, on_disk=on_disk, verified=verify_tokens > 0))

    def fingerprint() -> dict[str, str]:
        return {
            "the model": file_fingerprint(source, used),
            "the calibration data": data.fingerprint(),
            "the recipe": json.dumps(settings.resolved(), sort_keys=True),
            "the plan": "" if edited is None else edited.to_json(),
            "the format": output_format,
            "the provider": provider,
            "the versions": json.dumps(versions(), sort_keys=True),
        }

    def again(changed: Plan) -> Report:
        return convert(
            source,
            target,
            calibration=calibration if isinstance(calibration, _PATH) or calibration is None else list(data.opened),
            tokenizer=tokenizer,
            recipe=settings.with_overrides({"fallback.rounds": settings.fallback.rounds - 1}),
            output_format=output_format,
            plan=changed,
            fuse=fuse,
            verify_tokens=verify_tokens,
            max_kl=limit,
            provider=provider,
            threads=threads,
            max_memory=max_memory,
            work_dir=None if work_dir is None else f"{os.fspath(work_dir)}.fall-back-{settings.fallback.rounds}",
            stop=stop,
            progress=progress,
        )

    missed: VerificationError | None = None
    with workspace(work_dir, target, fingerprint, wanted=on_disk) as data.work:
        # What the next round's plan was made for: a call that asks for something else makes its own.
        wish = {"max_kl": limit, "verify_tokens": verify_tokens}
        changed = None if dry_run else next_plan(data.work, wish)
        if changed is None:
            with watch.stage("calibrate"):
                groups = observed_groups(graph.groups, settings, edited)
                places = {str(group.activation.name): segments.of(group.layers[0]) for group in groups}
                statistics = data.observe(graph.model, segments, places)
            with watch.stage("plan"):
                decisions = decide_groups(groups, statistics, settings, edited, data.samples, graph.linears)
                made = make_plan(graph.linears.layers, decisions, settings)
                if edited is not None:
                    made = dataclasses.replace(edited, recipe=made.recipe)
                errors = step_errors(decisions, data.samples, settings) if settings.fallback != FallbackRecipe() else {}
                if edited is None:
                    made = keep_float(made, errors, settings.fallback.float_layers)
                entries = {entry.name: entry for entry in made.layers}
                report = start_report(
                    source,
                    None if dry_run else target,
                    output_format,
                    graph.model,
                    graph.linears,
                    entries,
                    rotation,
                    settings,
                    data.opened,
                    segments.description,
                )
            if not any(entry.is_quantized for entry in made.layers):
                raise NothingQuantizedError(str(source), why_nothing(made), "Change include and exclude, or the plan")
            if dry_run:
                path = target.with_suffix(".plan.json")
                write_text(path, made.to_json())
                report.plan = str(path)
                return _finish(report, watch, progress)

            with watch.stage("equalize"):
                applied = equalize(graph.model, decisions)
                equalized = graph.model.clone()
                # Equalization may have put nodes where the segments meet.
                segments = find_segments(graph.model, find_linears(graph.model))
            with watch.stage("quantize"):
                quantized = quantize_layers(
                    graph.model, segments, decisions, entries, statistics, applied, settings, data, progress
                )
                report.embedding = rewrite(
                    graph.model,
                    quantized.layers,
                    output_format,
                    embedding=settings.layers.embedding,
                    group_size=settings.weights.group_size,
                    fuse=fuse,
                )
                graph.model.metadata_props[RECIPE_KEY] = json.dumps(settings.resolved())
                complete_layers(report, graph.model, applied, quantized.methods, decisions)
                report.segment_seconds = data.seconds
            with staged(target) as staging:
                with watch.stage("save"):
                    report.bytes_after = stored_bytes(graph.model)
                    save_model(graph.model, staging.path)
                if verify_tokens:
                    data.stop_if_asked("saving the model, before its verification")
                    with watch.stage("verify"):
                        check = Comparison(
                            source,
                            equalized,
                            staging.path,
                            data.sample(verify_tokens),
                            data=report.calibration,
                            max_kl=limit,
                            provider=provider,
                            threads=threads,
                            by_blocks=expected.by_blocks(budget),
                            progress=progress,
                            stop=data.stop_if_asked,
                        )
                        report.verification, noise = check.run()
                        for layer in report.layers:
                            layer.snr_db = noise.get(layer.name)
                write_text(staging.path.with_suffix(".json"), _finish(report, watch, progress).to_json())
                staging.publish()
            kl_mean = None if report.verification is None else report.verification.kl_mean
            if report.verification is not None and not report.verification.passed:
                if kl_mean is not None and limit is not None and settings.fallback.rounds:
                    logger.warning("mean KL %.4f is over %g: converting again with layers fallen back", kl_mean, limit)
                    changed = fall_back(made, errors, _FALLBACK_MARGIN * limit / kl_mean)
                    keep_next_plan(data.work, changed, wish)
                else:
                    missed = _too_far(target, report, limit)
        if changed is not None:
            try:
                report = again(changed)
            except VerificationError as error:  # the work is done all the same
                missed = error
    if missed is not None:
        raise missed
    return report


def _too_far(target: Path, report: Report, limit: float | None) -> VerificationError:
    kl_mean = None if report.verification is None else report.verification.kl_mean
    return VerificationError(
        str(target),
        f"there are no logits whose KL could be held against max_kl {limit}"
        if kl_mean is None
        else f"mean KL {kl_mean:.4f} is over the allowed {limit}",
        "Keep more layers float, use a more accurate recipe, or raise --max-kl",
        report,
    )


def _check_request(
    target: Path, output_format: str, fuse: bool, max_kl: float | None, verify_tokens: int, rounds: int
) -> None:
    """Refuse before the long work what could only fail after it."""
    if not target.parent.is_dir():
        raise ModelError(str(target), "its folder does not exist", "Create the folder")
    if output_format not in PASSES:
        raise RecipeError(f"format {output_format!r}", "it is unknown", f"Use {', '.join(PASSES)}")
    if fuse and output_format != "custom":
        raise RecipeError("fuse", f"the format {output_format} has no fused ops", "Use the format custom")
    if max_kl is not None and not max_kl > 0:
        raise RecipeError("max_kl", f"{max_kl:g} is no divergence that a quantized model can meet", "Allow more than 0")
    if rounds and max_kl is None:
        raise RecipeError("fallback.rounds", "there is no max_kl to fall back for", "Give --max-kl, or no rounds")
    if max_kl is not None and not verify_tokens:
        raise RecipeError("max_kl", "without verification there is no KL to hold against it", "Verify some tokens")


def _check_output(target: Path, dry_run: bool, read: Sequence[Path]) -> None:
    """Refuse an output over what is read, over a foreign file, or where nothing can be written."""
    companion = target.with_suffix(".plan.json" if dry_run else ".json")
    written = [companion] if dry_run else [target, Path(f"{target}.data"), companion]
    refuse_overwriting(written, read[:1])
    refuse_overwriting(written, read[1:], "this is a file that the conversion reads")
    if companion == target:
        raise ModelError(str(target), "its report would have the same name", "Choose a name that ends in .onnx")
    if not dry_run and os.path.exists(companion) and not is_report(companion):
        raise ModelError(
            str(companion),
            f"the report of {target.name} would replace it, and it is no report",
            "Choose another output",
        )
    for path in written:
        with staged(path):
            pass


def _beside(source: Path) -> list[Path]:
    """The tokenizer beside a model, which reads a text without being named."""
    found = find_tokenizer(source)
    return [] if found is None else [found]


@dataclass(frozen=True, eq=False)
class _Graph:
    """A loaded model and what is in it."""

    model: ir.Model
    linears: LinearSearch
    groups: list[ActivationGroup]

    @classmethod
    def load(cls, path: Path) -> _Graph:
        model = load_model(path)
        ensure_opset(model)
        return cls.find(model, path)

    @classmethod
    def find(cls, model: ir.Model, path: Path) -> _Graph:
        linears = find_linears(model)
        if not linears.layers:
            reasons = "; ".join(f"{skipped.node_name}: {skipped.reason}" for skipped in linears.skipped[:3])
            raise NothingQuantizedError(
                str(path),
                f"it has no linear layer with a constant weight{f' ({reasons})' if reasons else ''}",
                "Convert the float model, exported with its weights",
            )
        return cls(model, linears, group_by_activation(linears.layers))


def _finish(report: Report, watch: Stopwatch, progress: Progress) -> Report:
    report.seconds = watch.seconds
    report.peak_memory_bytes = peak_memory_bytes()
    progress.note(f"peak memory {report.peak_memory_bytes / 2**30:.2f} GiB")
    return report
