"""What every GPU test needs, or the reason why it cannot run here."""

import ctypes
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


def _has_gpu() -> bool:
    """Whether NVIDIA's driver knows a device, whatever packages are installed."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _missing() -> str | None:
    """Why the GPU tests cannot run, or None: without a GPU nothing else matters."""
    if not _has_gpu():
        return "there is no NVIDIA GPU"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "this torch cannot use the GPU (install one for its driver's CUDA version)"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDAExecutionProvider (install onnxruntime-gpu)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if not ours:
        return
    reason = _missing()
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `whole_device` have the device for themselves, whatever other workers of pytest-xdist run."""
    lock = Path(tempfile.gettempdir()) / f"fptq-onnx-gpu-tests-{os.getuid()}.lock"
    with lock.open("w") as file:
        alone = request.node.get_closest_marker("whole_device") is not None
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@pytest.fixture(scope="session")
def library() -> str:
    """Path of the operator library; it must have been built with CUDA, which a session on it would tell."""
    from gpu_bench.sessions import op_library

    return op_library()


@pytest.fixture
def generator():
    import torch

    return torch.Generator("cuda").manual_seed(20)
