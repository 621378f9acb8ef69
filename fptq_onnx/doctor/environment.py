"""Packages, the runtime, the GPU's driver and the op library."""

from __future__ import annotations

__all__ = ["check_gpu", "check_library", "check_runtime"]

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata

from fptq_onnx.doctor.findings import Finding, Status
from fptq_onnx.doctor.probe import Probe, run_probe
from fptq_onnx.errors import RuntimeUnavailableError
from fptq_onnx.ops.inspection import LibraryDescription, describe_library, explain_load_failure
from fptq_onnx.ops.library import LIBRARY_VARIABLE, get_library_path, library_info
from fptq_onnx.report import versions
from fptq_onnx.runtime import Provider

_OLDEST, _NEWEST = (1, 23), (1, 32)
_OLDEST_GPU = 80
# All of them install the module `onnxruntime`, in one folder.
_RUNTIME = re.compile(
    r"(onnxruntime|ort[-_]nightly)([-_](gpu|directml|training|openvino|qnn|rocm|cann))?", re.IGNORECASE
)
_CUDA_PROVIDER = "CUDAExecutionProvider"


def check_runtime(provider: Provider) -> tuple[list[Finding], bool]:
    """Versions, and whether the onnxruntime that imports is the one that was meant.

    Returns:
        The findings, and whether onnxruntime imports.
    """
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises many kinds
        return list(_check_packages(error)), False
    findings = [*_check_packages(None), *_check_providers(onnxruntime.__version__, provider)]
    return findings, True


def _check_packages(import_error: Exception | None) -> Iterator[Finding]:
    found = versions()
    system = {"python", "platform"}
    yield Finding("system", Status.OK, f"Python {found['python']}, {found['platform']}, {_cpu_name()}")
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if name not in system)
    yield Finding("packages", Status.OK, packages)
    installed = _runtimes()
    names = [package.split()[0] for package in installed]
    if len(set(names)) > 1:
        yield Finding(
            "onnxruntime",
            Status.BROKEN,
            f"{' and '.join(installed)} are installed side by side: they share one folder, and the last one won",
            f"Run `pip uninstall -y {' '.join(names)}`, then `pip install {_kept(names)}`",
        )
    if import_error is not None:
        yield Finding(
            "onnxruntime",
            Status.BROKEN,
            f"it does not import ({import_error})" if names else "it is not installed",
            f"Run `pip install {'--force-reinstall ' if names else ''}{_kept(names)}`",
        )


def _check_providers(runtime_version: str, provider: Provider) -> Iterator[Finding]:
    import onnxruntime

    keep = _kept([package.split()[0] for package in _runtimes()])
    version = tuple(int(part) for part in re.findall(r"\d+", runtime_version)[:2])
    providers = onnxruntime.get_available_providers()
    detail = f"{runtime_version} with {', '.join(providers)}"
    if version < _OLDEST:
        yield Finding(
            "onnxruntime", Status.BROKEN, f"{detail}; the op library needs 1.23", f"Run `pip install -U {keep}`"
        )
    elif version > _NEWEST:
        yield Finding("onnxruntime", Status.NOTE, f"{detail}; newer than 1.32, the last one tested")
    else:
        yield Finding("onnxruntime", Status.OK, detail)
    if provider == "cuda" and _CUDA_PROVIDER not in providers:
        yield Finding(
            "provider cuda",
            Status.BROKEN,
            "this onnxruntime has no CUDA provider; sessions that ask for it would silently run on the CPU",
            f"Run `pip uninstall -y {keep}`, then `pip install onnxruntime-gpu`",
        )


def check_gpu(library: LibraryDescription | None, provider: Provider) -> Iterator[Finding]:
    """The GPU, its driver and whether the op library can use it.

    Args:
        library: From `check_library`; None if it does not load.
        provider: A GPU that cannot be used is worse where it was asked for.
    """
    gpus, driver = _nvidia_smi(), _driver_version()
    needed = Status.BROKEN if provider == "cuda" else Status.NOTE
    if not gpus and driver is None:
        yield Finding(
            "GPU",
            needed,
            "no NVIDIA driver (neither nvidia-smi nor libcuda.so.1)",
            "Use a machine with an NVIDIA GPU and driver" if provider == "cuda" else None,
        )
        return
    if driver is None:
        yield Finding("GPU", needed, "libcuda.so.1 does not load", "Install the NVIDIA driver's libraries here")
    for name, capability in gpus:
        cuda = "" if driver is None else f", driver for CUDA {driver}"
        status, fix = Status.OK, None
        if round(float(capability) * 10) < _OLDEST_GPU:
            status, fix = needed, "Use a GPU of compute capability 8.0 or newer, or the CPU"
        yield Finding("GPU", status, f"{name}, compute capability {capability}{cuda}", fix)
    if library is None:
        return
    if not library.has_cuda:
        yield Finding(
            "CUDA kernels",
            Status.BROKEN if provider == "cuda" else Status.WARNING,
            "the op library was built without them",
            "Build it where nvcc is on PATH: `pip install --force-reinstall --no-deps .`",
        )
    elif library.cuda_error is not None:
        yield Finding(
            "CUDA kernels",
            needed,
            f"CUDA finds no device: {library.cuda_error}",
            f"Update the NVIDIA driver: the library was built with CUDA {library_info().cuda}",
        )
    else:
        for gpu in library.gpus:
            detail = f"on {gpu.name}: {', '.join(gpu.kernels) or 'none'}"
            yield Finding("CUDA kernels", Status.OK if gpu.kernels else needed, detail)


def check_library(runtime_works: bool) -> tuple[list[Finding], LibraryDescription | None]:
    """Find the op library, load it, register it.

    Args:
        runtime_works: Whether onnxruntime imports; without it nothing can be registered.

    Returns:
        The findings, and what the library says; None if it does not load.
    """
    try:
        path = get_library_path()
    except RuntimeUnavailableError as error:
        return [Finding("op library", Status.BROKEN, f"{error.where}: {error.reason}", error.fix)], None
    override = f" (from {LIBRARY_VARIABLE})" if os.environ.get(LIBRARY_VARIABLE) else ""
    try:
        library = describe_library(path)
    except RuntimeUnavailableError as error:
        return [Finding("op library", Status.BROKEN, f"{path}{override}: {error.reason}", error.fix)], None
    findings = [*_check_build(library, override), *_check_kernels(library)]
    if runtime_works:
        findings.append(_check_registration(library))
    return findings, library


def _runtimes() -> list[str]:
    """Name and version of every installed package that brings the module `onnxruntime`."""
    return sorted(
        {
            f"{distribution.metadata['Name']} {distribution.version}"
            for distribution in metadata.distributions()
            if _RUNTIME.fullmatch(distribution.metadata["Name"] or "")
        }
    )


def _kept(names: Sequence[str]) -> str:
    """The package to install again: the one that can do more."""
    return "onnxruntime-gpu" if "onnxruntime-gpu" in names else names[0] if names else "onnxruntime"


def _check_build(library: LibraryDescription, override: str) -> Iterator[Finding]:
    detail = f"{library.path}{override}, version {library.version}"
    try:
        cuda = library_info().cuda
        yield Finding("op library", Status.OK, f"{detail}, {'CPU only' if cuda is None else f'CUDA {cuda}'}")
    except RuntimeUnavailableError as error:
        yield Finding("op library", Status.WARNING, f"{detail}: {error.reason}", error.fix)


def _check_kernels(library: LibraryDescription) -> Iterator[Finding]:
    if library.cpu_error is not None:
        yield Finding(
            "CPU kernels",
            Status.BROKEN,
            library.cpu_error,
            "Unset FPTQ_CPU_ISA, or set it to one of " + ", ".join(library.cpu_kernels),
        )
    else:
        few = f" ({library.cpu_few_rows} below {library.cpu_few_rows_below} rows)" if library.cpu_few_rows else ""
        status = Status.WARNING if library.cpu_kernel == "portable" else Status.OK
        yield Finding(
            "CPU kernels",
            status,
            f"{library.cpu_kernel}{few} will run; this CPU can run {', '.join(library.cpu_kernels)}",
            "Use a CPU with AVX2 or newer for speed" if status is Status.WARNING else None,
        )


def _check_registration(library: LibraryDescription) -> Finding:
    probe = run_probe(Probe(("CPUExecutionProvider",), str(library.path)))
    if probe.error is None:
        return Finding("registration", Status.OK, "onnxruntime takes the op library")
    reason, fix = explain_load_failure(library.path, f"{probe.error}\n{probe.log}")
    return Finding("registration", Status.BROKEN, f"onnxruntime refuses the op library: {reason}", fix)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _nvidia_smi() -> list[tuple[str, str]]:
    """Name and compute capability of each GPU, as the driver's own tool says; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    pairs = (line.rsplit(",", 1) for line in done.stdout.splitlines() if line.count(",") >= 1)
    return [
        (name.strip(), capability.strip()) for name, capability in pairs if re.fullmatch(r"\s*\d+\.\d+\s*", capability)
    ]


def _driver_version() -> str | None:
    """Newest CUDA version that the driver supports; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
