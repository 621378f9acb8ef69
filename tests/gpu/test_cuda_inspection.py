"""What the library says about this GPU, and that the doctor finds nothing wrong with it."""

from __future__ import annotations

import pytest
import torch

from fptq_onnx.doctor.diagnose import diagnose
from fptq_onnx.ops.inspection import Product, describe_library, kernel_name


def test_library_sees_the_gpu(library: str) -> None:
    described = describe_library(library)
    assert described.has_cuda and described.cuda_error is None
    gpu = described.gpus[0]
    major, minor = torch.cuda.get_device_capability(0)
    assert (gpu.name, gpu.capability) == (torch.cuda.get_device_name(0), 10 * major + minor)
    assert gpu.memory_bytes == torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 64, 4096])
def test_kernel_is_one_that_runs_here(library: str, rows: int, integer: bool) -> None:
    name = kernel_name(Product(rows, 4096, 4096, 128, integer, 2), cuda_device=0)
    assert name.split()[0] in describe_library(library).gpus[0].kernels
    if torch.cuda.get_device_capability(0) == (9, 0) and rows != 64:  # where the two cross
        assert name.split()[0] == ("stream" if rows <= 16 else "warpgroup")


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 4096])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 14336), (576, 1536)])
def test_kernel_that_quantizes_says_so(library: str, rows: int, k: int, n: int) -> None:
    """Where it pays, up to eight rows; more are quantized first."""
    plain, fused = (kernel_name(Product(rows, k, n, 128, True, 2, quantizes), 0) for quantizes in (False, True))
    assert fused in (plain, f"{plain} quantizing")
    assert "quantizing" not in plain and (rows <= 8 or fused == plain)
    if torch.cuda.get_device_capability(0) == (9, 0) and (rows, n) == (1, 14336):
        assert fused != plain


def test_doctor_finds_nothing_broken(library: str) -> None:
    assert not [finding for finding in diagnose(provider="cuda").findings if finding.status == "broken"]
