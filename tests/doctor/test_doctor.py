"""Planted faults: each must be found, with its cause and its fix, and give exit code 1 where it breaks something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import onnx_ir as ir
import pytest
from conversions import converted
from typer.testing import CliRunner

import fptq_onnx
from fptq_onnx.cli import app
from fptq_onnx.doctor import environment
from fptq_onnx.doctor.diagnose import diagnose
from fptq_onnx.doctor.environment import check_gpu, check_library, check_runtime
from fptq_onnx.doctor.explain import explain_session_error
from fptq_onnx.doctor.findings import Finding, Status
from fptq_onnx.doctor.model import _judge, check_model
from fptq_onnx.doctor.probe import Probe, ProbeResult, run_probe
from fptq_onnx.ops.inspection import Gpu, LibraryDescription, describe_library
from fptq_onnx.ops.library import LIBRARY_VARIABLE, get_library_path

LIBRARY = get_library_path()


def _one(findings: list[Finding], check: str) -> Finding:
    found = [finding for finding in findings if finding.check == check]
    assert len(found) == 1, found
    return found[0]


def _only_fault(findings: list[Finding], check: str, status: Status = Status.BROKEN) -> Finding:
    """The one finding that is worse than a note; it must say what to do."""
    faults = [finding for finding in findings if finding.status in (Status.WARNING, Status.BROKEN)]
    assert [fault.check for fault in faults] == [check], faults
    assert faults[0].status is status and faults[0].fix
    return faults[0]


def _model(path: Path) -> list[Finding]:
    return list(check_model(path, LIBRARY, "cpu", True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized decoder with its tokenizer."""
    quantized = converted("llama", families.DYNAMO_KV)
    shutil.copy(quantized.path, tmp_path / "model.onnx")
    shutil.copy(quantized.tiny.tokenizer, tmp_path / "tokenizer.json")
    return tmp_path


# The installation


def test_healthy_installation_and_model(folder: Path) -> None:
    diagnosis = diagnose(folder / "model.onnx")
    assert not diagnosis.broken
    checks = [finding.check for finding in diagnosis.findings]
    assert checks[:3] == ["system", "packages", "onnxruntime"]
    for title in ("with the op library", "without the op library"):
        assert _one(list(diagnosis.findings), title).detail.startswith("the model opens and runs (")
    kernels = _one(list(diagnosis.findings), "CPU kernels").detail
    assert kernels.startswith(f"{describe_library().cpu_kernel}") and "portable" in kernels


def test_two_runtimes_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "onnxruntime_gpu-1.30.0.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.30.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    findings, works = check_runtime("cpu")
    assert works
    fault = _only_fault(findings, "onnxruntime")
    assert "onnxruntime-gpu 1.30.0 are installed side by side" in fault.detail
    assert fault.fix == ("Run `pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install onnxruntime-gpu`")


@pytest.mark.parametrize("installed", [True, False])
def test_no_runtime(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    if not installed:
        monkeypatch.setattr(environment, "_runtimes", list)
    findings, works = check_runtime("cpu")
    fault = _only_fault(findings, "onnxruntime")
    assert not works
    assert fault.detail.startswith("it does not import (" if installed else "it is not installed")
    assert fault.fix == f"Run `pip install {'--force-reinstall ' if installed else ''}onnxruntime`"
    found, library = check_library(works)
    assert library is not None and "registration" not in {finding.check for finding in found}


@pytest.mark.parametrize(("version", "status"), [("1.22.1", Status.BROKEN), ("1.99.0", Status.NOTE)])
def test_runtime_of_another_time(monkeypatch: pytest.MonkeyPatch, version: str, status: Status) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    found = _one(check_runtime("cpu")[0], "onnxruntime")
    assert found.status is status and found.detail.startswith(version)


def test_provider_that_is_not_there() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert not any(finding.check == "provider cuda" for finding in check_runtime("cuda")[0])
    else:
        fault = _only_fault(check_runtime("cuda")[0], "provider cuda")
        assert "silently run on the CPU" in fault.detail and "pip install onnxruntime-gpu" in str(fault.fix)


# The op library


def _planted_library(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[Finding]:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    return check_library(True)[0]


def _compiled(path: Path, source: str) -> Path:
    code = path.with_suffix(".c")
    code.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, code], check=True)
    path.with_suffix(".json").write_text('{"version": "0.1.0", "cuda": null}')
    return path


def test_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fault = _only_fault(_planted_library(monkeypatch, tmp_path / "gone.so"), "op library")
    assert "gone.so: there is no such file" in fault.detail


def test_library_for_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = bytearray(LIBRARY.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")
    (tmp_path / "arm.so").write_bytes(data)
    fault = _only_fault(_planted_library(monkeypatch, tmp_path / "arm.so"), "op library")
    assert "(from FPTQ_OPS_LIBRARY)" in fault.detail and "built for aarch64" in fault.detail
    assert "Build the library on this machine" in str(fault.fix)


def test_library_cut_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "short.so").write_bytes(LIBRARY.read_bytes()[:-5000])
    assert "cut short" in _only_fault(_planted_library(monkeypatch, tmp_path / "short.so"), "op library").detail


def test_library_without_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(LIBRARY, tmp_path / "alone.so")
    fault = _only_fault(_planted_library(monkeypatch, tmp_path / "alone.so"), "op library", Status.WARNING)
    assert "No such file or directory: " in fault.detail and "alone.json" in fault.detail


DESCRIPTION = json.dumps(
    {
        "version": "0.1.0",
        "cpu": {"available": ["portable"], "chosen": "portable", "few_rows": None, "few_rows_below": 0, "error": None},
        "cuda": None,
    }
)
DESCRIBES = f"""
const char* FptqDescribeLibrary(void) {{ return {json.dumps(DESCRIPTION)}; }}
int FptqDescribeProduct(const void* product, char* text, unsigned long size) {{ return 0; }}
"""


def test_library_of_another_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = _compiled(tmp_path / "other.so", DESCRIBES)
    found = _planted_library(monkeypatch, path)
    fault = _one(found, "registration")
    assert fault.status is Status.BROKEN and "exports no RegisterCustomOps" in fault.detail
    assert _one(found, "CPU kernels").status is Status.WARNING  # portable only


def test_library_that_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = f"#include <stdlib.h>\n{DESCRIBES}\nvoid* RegisterCustomOps(void* a, void* b) {{ abort(); }}"
    fault = _one(_planted_library(monkeypatch, _compiled(tmp_path / "crash.so", source)), "registration")
    assert fault.status is Status.BROKEN and "crashes while it is loaded (SIGABRT)" in fault.detail and fault.fix


def test_library_for_another_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a library does that asks for the API of its own headers and trusts the answer."""
    source = (
        "typedef struct { void** (*GetApi)(unsigned); } Base;\n"
        f"{DESCRIBES}\nvoid* RegisterCustomOps(void* options, const Base* base) {{ return base->GetApi(99)[1]; }}"
    )
    fault = _one(_planted_library(monkeypatch, _compiled(tmp_path / "newer.so", source)), "registration")
    assert "it was built for onnxruntime 1.99 only, and this one is 1." in fault.detail
    assert "serves any onnxruntime from 1.23" in str(fault.fix)


def test_instruction_set_that_cannot_run(folder: Path) -> None:
    """In a process of its own: a library reads the variable once."""
    script = "import sys; from fptq_onnx.cli import main; sys.argv[0] = 'fptq-onnx'; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", folder / "model.onnx", "--json"],
        env=os.environ | {"FPTQ_CPU_ISA": "sse9", "PYTHONPATH": str(Path(fptq_onnx.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = [Finding(**finding) for finding in json.loads(done.stdout)["findings"]]
    assert _one(found, "CPU kernels").fix.startswith("Unset FPTQ_CPU_ISA")
    assert "FPTQ_CPU_ISA asks for 'sse9'" in _one(found, "with the op library").detail
    assert _one(found, "without the op library").status == "ok"


# The GPU


@pytest.mark.parametrize(
    ("output", "provider", "status"),
    [
        ("NVIDIA H200, 9.0", "cpu", Status.OK),
        ("Tesla T4, 7.5", "cuda", Status.BROKEN),
        ("Tesla T4, 7.5", "cpu", Status.NOTE),
    ],
)
def test_gpu_by_its_own_tool(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, provider: str, status: Status
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{output}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(environment, "_driver_version", lambda: "13.0")
    found = _one(list(check_gpu(None, provider)), "GPU")
    name, capability = output.split(", ")
    assert found.detail == f"{name}, compute capability {capability}, driver for CUDA 13.0"
    assert found.status is status and (status is Status.OK or "8.0 or newer" in str(found.fix))


def test_gpu_that_the_library_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: [("NVIDIA H200", "9.0")])
    monkeypatch.setattr(environment, "_driver_version", lambda: "12.4")

    def library(**changes: object) -> LibraryDescription:
        values = vars(describe_library()) | {"has_cuda": True, "gpus": (), "cuda_error": None} | changes
        return LibraryDescription(**values)

    fault = _only_fault(list(check_gpu(library(has_cuda=False), "cuda")), "CUDA kernels")
    assert "built without them" in fault.detail and "nvcc" in str(fault.fix)
    fault = _only_fault(list(check_gpu(library(cuda_error="driver is insufficient"), "cuda")), "CUDA kernels")
    assert "driver is insufficient" in fault.detail and "Update the NVIDIA driver" in str(fault.fix)
    gpu = Gpu(0, "NVIDIA H200", 90, 1 << 37, ("stream", "warpgroup"))
    found = _one(list(check_gpu(library(gpus=(gpu,)), "cuda")), "CUDA kernels")
    assert found.status is Status.OK and found.detail == "on NVIDIA H200: stream, warpgroup"


@pytest.mark.parametrize(
    ("log", "reason", "fix"),
    [
        (
            "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: "
            "cannot open shared object file: No such file or directory",
            "needs libcublasLt.so.13",
            "preload_dlls",
        ),
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=0", "no CUDA-capable device", "driver"),
        ("", "without saying why", "nvidia-smi"),
    ],
)
def test_silent_fall_back_to_the_cpu(log: str, reason: str, fix: str) -> None:
    result = ProbeResult("done", None, log, ("CPUExecutionProvider",), {"CPUExecutionProvider": 5})
    fault = _only_fault(list(_judge("session", result, "cuda", Status.BROKEN)), "session")
    assert "fell back to the CPU silently" in fault.detail and reason in fault.detail and fix in str(fault.fix)
    both = ProbeResult(
        "done",
        None,
        "",
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
        {"CUDAExecutionProvider": 50, "CPUExecutionProvider": 5},
    )
    ok, note = _judge("session", both, "cuda", Status.BROKEN)
    assert ok.status is Status.OK and note.status is Status.NOTE and note.detail.startswith("5 nodes run on the CPU")


# The model


def test_model_files_that_cannot_be_read(folder: Path) -> None:
    path = folder / "model.onnx"
    data = path.read_bytes()
    assert "missing.onnx: there is no such file" in _only_fault(_model(folder / "missing.onnx"), "model").detail
    path.write_bytes(data[: len(data) // 2])
    assert "truncated" in _only_fault(_model(path), "model").detail
    tiny = families.model("llama", families.GENAI_FP16)
    shutil.copy(tiny.path, path)
    fault = _only_fault(_model(path), "model")
    assert "model.onnx.data" in fault.detail and fault.fix


def test_model_from_the_future(folder: Path) -> None:
    """An IR version that onnx does not know either is found before onnxruntime is asked."""
    path = folder / "model.onnx"
    model = ir.load(families.model("bert", families.DYNAMO).path)
    model.opset_imports[""] = 99
    ir.save(model, path)
    fault = _only_fault(_model(path), "session")
    assert "opset 99 is newer than this onnxruntime knows" in fault.detail and "Upgrade onnxruntime" in str(fault.fix)

    model = ir.load(families.model("bert", families.DYNAMO).path)
    model.ir_version = 99
    ir.save(model, path)
    assert "IR version 99" in _only_fault(_model(path), "model").detail
    refused = run_probe(Probe(("CPUExecutionProvider",), model=str(path)))
    reason, fix = explain_session_error(str(refused.error))
    assert reason.startswith("its IR version 99 is newer than this onnxruntime knows (") and "Upgrade" in fix


def test_model_without_function_bodies(folder: Path) -> None:
    """It works with the library, so it is no more than a warning; without the library it is broken."""
    path = folder / "model.onnx"
    model = ir.load(path)
    model.functions.clear()
    ir.save(model, path)
    findings = _model(path)
    assert _one(findings, "function bodies").status is Status.WARNING
    assert _one(findings, "with the op library").status is Status.OK
    without = _one(findings, "without the op library")
    assert without.status is Status.WARNING and "of the domain fptq is not known" in without.detail
    alone = list(check_model(path, None, "cpu", True))
    assert _one(alone, "without the op library").status is Status.BROKEN


def test_operators_of_another_library(folder: Path) -> None:
    path = folder / "model.onnx"
    model = ir.load(families.model("bert", families.DYNAMO).path)
    node = ir.node("BertTokenizer", [model.graph.inputs[0]], domain="ai.onnx.contrib", name="strange")
    model.graph.append(node)
    model.opset_imports["ai.onnx.contrib"] = 1
    ir.save(model, path)
    findings = _model(path)
    assert "ai.onnx.contrib" in _one(findings, "operators").detail
    fault = _one(findings, "session")
    assert fault.status is Status.BROKEN and "onnxruntime-extensions" in str(fault.fix)


def test_tokenizer(folder: Path) -> None:
    path, tokenizer = folder / "model.onnx", folder / "tokenizer.json"
    fine = _one(list(check_model(path, None, "cpu", False)), "tokenizer")
    assert fine.status is Status.OK and fine.detail == f"{tokenizer}, 320 tokens"
    data = json.loads(tokenizer.read_text())
    data["model"]["vocab"] |= {f"extra{i}": 1000 + i for i in range(400)}
    tokenizer.write_text(json.dumps(data))
    assert "more than the 323 rows" in _only_fault(list(check_model(path, None, "cpu", False)), "tokenizer").detail
    tokenizer.write_text("{}")
    assert "is not a tokenizer" in _only_fault(list(check_model(path, None, "cpu", False)), "tokenizer").detail
    tokenizer.unlink()
    assert "Copy it from" in str(
        _only_fault(list(check_model(path, None, "cpu", False)), "tokenizer", Status.WARNING).fix
    )


def _genai(folder: Path, library: str | None) -> Path:
    options = {} if library is None else {"custom_ops_library": library}
    config = {"model": {"decoder": {"filename": "model.onnx", "session_options": options}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def test_genai_folder(folder: Path) -> None:
    """The folder itself is examined; the library must be named, be there and be taken."""
    fault = _only_fault(_model(_genai(folder, None)), "genai folder", Status.WARNING)
    assert "names no custom_ops_library" in fault.detail
    fault = _only_fault(_model(_genai(folder, "libfptq_ops.so")), "genai folder")
    assert "which is not in the folder" in fault.detail and "get_library_path" in str(fault.fix)
    (folder / "libfptq_ops.so").write_bytes(LIBRARY.read_bytes()[:9000])
    assert "cut short" in _only_fault(_model(folder), "genai folder").detail
    shutil.copy(LIBRARY, folder)
    assert _one(_model(folder), "genai folder").status is Status.OK
    (folder / "genai_config.json").write_text("{")
    assert "is not JSON" in _only_fault(_model(folder / "model.onnx"), "genai folder").detail
    assert "is not JSON" in _only_fault(_model(folder), "model").detail


def test_model_that_takes_no_tokens(folder: Path) -> None:
    path = folder / "model.onnx"
    model = ir.load(families.model("bert", families.DYNAMO).path)
    for value in model.graph.inputs:
        value.name = f"pixels_{value.name}"
    ir.save(model, path)
    findings = _model(path)
    assert _one(findings, "run").status is Status.NOTE
    assert _one(findings, "session").detail == "the model opens"


def test_model_that_gives_nan(folder: Path) -> None:
    path = folder / "model.onnx"
    model = ir.load(families.model("bert", families.DYNAMO).path)
    name, value = max(model.graph.initializers.items(), key=lambda item: item[1].const_value.nbytes)
    value.const_value = ir.tensor(value.const_value.numpy() * float("nan"), name=name)
    ir.save(model, path)
    assert "NaN" in _only_fault(_model(path), "session").detail


def test_probe_tells_the_stage() -> None:
    missing = run_probe(Probe(("CPUExecutionProvider",), model="/nowhere.onnx"))
    assert missing.stage == "open" and "nowhere.onnx" in str(missing.error)
    assert run_probe(Probe(("CPUExecutionProvider",))).stage == "done"


# The command


def test_command(folder: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(folder / "model.onnx")], terminal_width=200)
    assert result.exit_code == 0, result.stdout
    assert "ok       with the op library" in result.stdout
    (folder / "model.onnx").write_bytes(b"")
    result = CliRunner().invoke(app, ["doctor", str(folder / "model.onnx")])
    assert result.exit_code == 1
    assert "broken   model" in result.stdout and "fix: Export the model again" in result.stdout
    result = CliRunner().invoke(app, ["doctor", str(folder / "model.onnx"), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["ok"] is False
    assert report["findings"][-1]["status"] == "broken" and report["findings"][-1]["fix"]
