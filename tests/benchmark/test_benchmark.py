"""Benchmarks of tiny models: what is measured for each kind, which kernel is named, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import families
import onnx_ir as ir
import pytest
from conversions import converted, recipe
from rich.console import Console
from typer.testing import CliRunner

import fptq_onnx
from fptq_onnx.benchmark.benchmark import benchmark
from fptq_onnx.benchmark.memory import peak_bytes, reset_peak, resident_bytes
from fptq_onnx.benchmark.results import BenchmarkReport, Case, CaseResult, Kind, ModelResult, Settings, Spread
from fptq_onnx.benchmark.show import show
from fptq_onnx.benchmark.worker import Worker
from fptq_onnx.cli import app
from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.ops.inspection import describe_library

QUICK = Settings(lengths=(6,), new_tokens=3, rounds=2, warmup=1, threads=1)
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def _text(report: BenchmarkReport) -> str:
    console = Console(width=160, soft_wrap=True, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(report, console)
    return console.export_text()


def _check_spread(spread: Spread | None) -> None:
    assert spread is not None and 0 < spread.low <= spread.median <= spread.high


def _check_model(model: ModelResult, kind: Kind) -> CaseResult:
    (case,) = model.cases
    assert model.kind is kind
    _check_spread(case.prefill)
    assert model.load_seconds > 0 and model.cold_first_token_ms > 0
    assert 0 < case.memory.before_bytes < case.memory.process_bytes <= model.memory.process_bytes
    return case


def test_quantized_decoder_against_float_and_function_bodies(tmp_path: Path) -> None:
    quantized, tiny = converted("llama", families.DYNAMO_KV).path, families.model("llama", families.DYNAMO_KV).path
    settings = Settings(lengths=(20, 6), batches=(2,), new_tokens=3, rounds=3, warmup=0, threads=1)
    report = benchmark(quantized, [tiny], settings=settings)
    assert [model.kind for model in report.models] == [Kind.DECODER, Kind.DECODER]
    ours, theirs = report.models
    assert ours.library and not theirs.library and ours.note is None
    for model in report.models:
        assert [result.case for result in model.cases] == [Case(2, 20, 3), Case(2, 6, 3)]
        for result in model.cases:
            for spread in (result.prefill, result.first_token_ms, result.decode, result.step_ms):
                _check_spread(spread)
            assert result.sequences is None and result.memory.gpu_bytes is None
            # Two sequences give two tokens a step.
            assert result.decode is not None and result.step_ms is not None
            assert result.decode.median == pytest.approx(2e3 / result.step_ms.median)
    _check_spread(ours.cases[0].prefill_ratio)
    _check_spread(ours.cases[0].decode_ratio)
    assert theirs.cases[0].prefill_ratio is None
    assert ours.file_bytes == quantized.stat().st_size

    # The profile: every linear layer with its label, the kernel that ran and how many rows it got.
    kernel = describe_library()
    assert ours.profile_case == Case(2, 6, 3)
    for profile, rows in ((ours.prefill_profile, 12), (ours.decode_profile, 2)):
        assert profile is not None
        layers = {layer.label: layer for layer in profile.layers}
        assert set(layers) == {*(f"block.{b}.{r}" for b in range(families.BLOCKS) for r in ROLES), "lm_head"}
        expected = kernel.cpu_few_rows if rows < kernel.cpu_few_rows_below else kernel.cpu_kernel
        integer = [layer for layer in layers.values() if layer.op == "W4A8MatMul"]
        assert len(integer) == 21 and {layer.kernel for layer in integer} == {expected}
        assert {layer.rows for layer in layers.values()} == {rows}
        assert {layer.provider for layer in layers.values()} == {"CPUExecutionProvider"}
        assert sum(op.share for op in profile.ops) == pytest.approx(1)
        assert sum(layer.share for layer in profile.layers) < 1
        assert sum(op.microseconds for op in profile.ops) == pytest.approx(profile.node_microseconds)
        assert sum(op.nodes for op in profile.ops if op.op == "W4A8MatMul") == 21
    assert theirs.prefill_profile is not None
    assert {layer.label for layer in theirs.prefill_profile.layers} == {layer.label for layer in profile.layers}
    text = _text(report)
    assert "x prefill" in text and f"block.*.down │ W4A8MatMul │ {kernel.cpu_kernel}" in text
    assert "interleaved rounds" in text and "op library registered" in text

    bodies = benchmark(quantized, settings=Settings(**{**vars(QUICK), "library": False}))
    case = _check_model(bodies.models[0], Kind.DECODER)
    assert not bodies.models[0].library and case.prefill_ratio is None
    assert bodies.models[0].prefill_profile is not None
    assert "W4A8MatMul" not in {op.op for op in bodies.models[0].prefill_profile.ops}


def test_products_that_quantize_their_activation(tmp_path: Path) -> None:
    """Layers of the fused op have labels, kernels and rows like those of the separate one."""
    path = tmp_path / "fused.fptq.onnx"
    tiny = families.model("gpt2", families.DYNAMO_KV).path
    fptq_onnx.convert(tiny, path, recipe=recipe(activations__scheme="per-token"), fuse=True, verify_tokens=0)
    (model,) = benchmark(path, settings=QUICK).models
    kernel = describe_library()
    for profile, rows in ((model.prefill_profile, 6), (model.decode_profile, 1)):
        assert profile is not None
        fused = [layer for layer in profile.layers if layer.op == "DynamicQuantizeW4A8MatMul"]
        assert len({layer.label for layer in fused}) == len(fused) == 4 * families.BLOCKS
        expected = kernel.cpu_few_rows if rows < kernel.cpu_few_rows_below else kernel.cpu_kernel
        assert {(layer.kernel, layer.rows) for layer in fused} == {(expected, rows)}


def test_models_of_genai_in_float16_and_matmulnbits() -> None:
    """One buffer for past and present, float16 on the CPU; kernels of MatMulNBits are told by their accuracy level."""
    tiny = families.model("llama", families.GENAI_FP16).path
    nbits = converted("llama", families.GENAI_FP32, "matmulnbits").path
    report = benchmark(tiny, [nbits], settings=QUICK)
    for model in report.models:
        _check_spread(_check_model(model, Kind.DECODER).decode)
    assert report.models[1].decode_profile is not None
    kernels = {layer.kernel for layer in report.models[1].decode_profile.layers if layer.op == "MatMulNBits"}
    assert len(kernels) == 1 and str(kernels.pop()).startswith("accuracy level ")


def test_decoder_without_cache() -> None:
    report = benchmark(families.model("llama", families.DYNAMO).path, settings=QUICK)
    case = _check_model(report.models[0], Kind.DECODER_WITHOUT_CACHE)
    assert case.decode is None and case.step_ms is None and case.decode_ratio is None
    _check_spread(case.first_token_ms)
    assert report.models[0].note is not None and report.models[0].decode_profile is None
    text = _text(report)
    assert "no key/value cache: prefill only" in text and "decode tokens/s" not in text


@pytest.mark.parametrize("architecture", ["bert", "bert-classifier"])
def test_encoders(architecture: str) -> None:
    """Also the one whose output is named logits and has a row per token: what comes later changes what came before."""
    report = benchmark(
        families.model(architecture, families.DYNAMO).path,
        settings=Settings(lengths=(6,), batches=(3,), rounds=2, threads=1, profile=False),
    )
    case = _check_model(report.models[0], Kind.ENCODER)
    assert case.first_token_ms is None and case.sequences is not None
    assert case.prefill.median == pytest.approx(6 * case.sequences.median)
    assert case.case == Case(3, 6, 0)
    assert report.models[0].prefill_profile is None
    assert "sequences/s" in _text(report)


def test_refusals(tmp_path: Path) -> None:
    """Errors that name the model and the option, before any process is started."""
    tiny = families.model("llama", families.DYNAMO_KV).path
    model = ir.load(families.model("bert", families.DYNAMO).path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([2, 16, *list(value.shape or ())[2:]])
    fixed = tmp_path / "fixed.onnx"
    ir.save(model, fixed)
    with pytest.raises(ModelError, match=r"fixed\.onnx: its length is fixed to 16, not 6. Use --lengths 16, or export"):
        benchmark(fixed, settings=QUICK)
    with pytest.raises(ModelError, match=r"fixed\.onnx: its batch is fixed to 2, not 1. Use --batches 2, or export"):
        benchmark(fixed, settings=Settings(batches=(1,)))
    with pytest.raises(ModelError, match="has 256 positions, too few for 300 tokens and 32 new ones"):
        benchmark(families.model("gpt2", families.DYNAMO_KV).path, settings=Settings(lengths=(300,)))
    with pytest.raises(ModelError, match=r"missing\.onnx: there is no such file"):
        benchmark(tiny, [tmp_path / "missing.onnx"], settings=QUICK)
    for value in model.graph.inputs:
        value.name = f"pixels_{value.name}"
    ir.save(model, fixed)
    with pytest.raises(ModelError, match=r"inputs pixels_input_ids, .*: none of them takes token ids"):
        benchmark(fixed, settings=QUICK)


def test_defaults_follow_the_model(tmp_path: Path) -> None:
    """Lengths that fit the positions, the batch that a graph fixes; another input is an error that names it."""
    model = ir.load(families.model("bert", families.DYNAMO).path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([2, *list(value.shape or ())[1:]])
    fixed = tmp_path / "fixed.onnx"
    ir.save(model, fixed)
    report = benchmark(fixed, settings=Settings(rounds=1, warmup=0, threads=1, profile=False))
    assert [result.case for result in report.models[0].cases] == [Case(2, 128, 0)]
    assert report.settings.lengths == (128,) and report.settings.batches == (2,)

    model.graph.inputs[1].name = "weather"
    ir.save(model, fixed)
    with pytest.raises(CalibrationError, match="input weather: is missing and does not follow from token ids"):
        benchmark(fixed, settings=QUICK)


def test_kinds_are_not_mixed() -> None:
    models = [families.model(name, families.DYNAMO).path for name in ("llama", "bert")]
    with pytest.raises(ModelError, match="is an encoder, and another model is a decoder"):
        benchmark(models[0], models[1:], settings=QUICK)


def test_a_process_that_dies_is_reported() -> None:
    path = families.model("llama", families.DYNAMO).path
    with Worker(path, describe_inputs(load_model(path)), False, QUICK) as worker:
        worker.open()
        os.kill(worker._process.pid or 0, signal.SIGKILL)
        with pytest.raises(ModelError, match="the process that ran it ended by SIGKILL"):
            worker.run(Case(1, 4, 0), 16)
    assert worker._process.exitcode == -signal.SIGKILL


def test_an_interrupt_ends_the_process_at_once() -> None:
    path = families.model("llama", families.DYNAMO).path
    worker = Worker(path, describe_inputs(load_model(path)), False, QUICK)
    with pytest.raises(KeyboardInterrupt), worker:
        worker.open()
        raise KeyboardInterrupt
    assert worker._process.exitcode == -signal.SIGKILL


def test_peak_memory_starts_again() -> None:
    gc.collect()  # what earlier tests left must not be freed between two readings
    reset_peak()
    before = resident_bytes()
    block = bytearray(b"x") * (64 << 20)
    peak = peak_bytes()
    assert peak - before > 32 << 20
    del block
    reset_peak()
    assert peak_bytes() < peak - (32 << 20)


def test_command(tmp_path: Path) -> None:
    model = str(families.model("llama", families.DYNAMO).path)
    quick = ["--lengths", "6", "--rounds", "1", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", model, *quick, "--json"], terminal_width=200)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["models"][0]["kind"] == "decoder without cache" and report["settings"]["lengths"] == [6]
    labels = [layer["label"] for layer in report["models"][0]["prefill_profile"]["layers"]]
    assert labels[-1] == "lm_head" and "block.0.q" in labels
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["Opening", "Timing", "Profiling"]
    for wrong in ("", "0", "1,x", "-3"):
        result = CliRunner().invoke(app, ["bench", model, "--lengths", wrong])
        assert result.exit_code == 2 and "not a list of positive numbers" in result.stderr
