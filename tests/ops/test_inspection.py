"""What the op library says about itself, and the causes of a refusal in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import op_models
import pytest

from fptq_onnx.errors import RuntimeUnavailableError
from fptq_onnx.ops.inspection import Product, describe_library, explain_load_failure, kernel_name
from fptq_onnx.ops.library import library_info

PRODUCT = Product(rows=1, k=576, n=1536, block_size=128, integer_scales=False, float_bytes=4)


def test_library_describes_itself() -> None:
    described = describe_library()
    assert described.version == library_info().version
    assert described.has_cuda == (library_info().cuda is not None)
    assert described.cpu_kernels[-1] == "portable" and described.cpu_error is None
    assert described.cpu_kernel in described.cpu_kernels
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert ("avx512vnni" in described.cpu_kernels) == ("avx512_vnni" in flags and "avx512dq" in flags)


def test_kernel_of_a_product() -> None:
    described = describe_library()
    few, many = (kernel_name(PRODUCT), kernel_name(Product(512, 576, 1536, 128, False, 4)))
    assert many == described.cpu_kernel
    assert few == (described.cpu_few_rows or described.cpu_kernel)


@pytest.mark.parametrize("wanted", ["portable", "sse9"])
def test_choice_by_environment(wanted: str) -> None:
    """The environment variable decides both the description and the kernel's name, or is named as the fault."""
    script = (
        "from fptq_onnx.ops.inspection import *\n"
        "described = describe_library(); print(described.cpu_kernel, '|', described.cpu_error)\n"
        "print(kernel_name(Product(4, 64, 64, 32, False, 4)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"FPTQ_CPU_ISA": wanted},
        capture_output=True,
        text=True,
        check=False,
    )
    if wanted == "portable":
        assert done.stdout == "portable | None\nportable\n"
    else:
        assert done.stdout.startswith("None | FPTQ_CPU_ISA names no kernels of this library")
        assert "FPTQ_CPU_ISA is 'sse9'" in done.stderr.splitlines()[-1]


def test_cuda_device_that_is_not_there() -> None:
    with pytest.raises(RuntimeUnavailableError, match="cannot say which kernel runs"):
        kernel_name(PRODUCT, cuda_device=63)


def _elf(machine: int) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(11) + machine.to_bytes(2, "little") + bytes(44)


def test_files_that_are_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libfptq_ops.so"
    assert explain_load_failure(path, "")[0] == "there is no such file"
    for contents, reason in (
        (b"", "no Linux library"),
        (b"MZ\x90" + bytes(40), "no Linux library"),
        (_elf(183), "it was built for aarch64 and this Python is x86_64"),
        (Path(op_models.library_path()).read_bytes()[:3000], r"it is cut short \(3000 bytes of"),
    ):
        path.write_bytes(contents)
        with pytest.raises(RuntimeUnavailableError, match=reason):
            describe_library(shutil.copy(path, tmp_path / f"{len(contents)}.so"))


def _compile(tmp_path: Path, source: str, *flags: str, name: str = "library.so") -> Path:
    code, library = tmp_path / f"{name}.c", tmp_path / name
    code.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, code, *flags], check=True)
    return library


def test_real_loader_messages(tmp_path: Path) -> None:
    """Libraries with the faults themselves, so that the words of this system's loader are the ones matched."""
    dependency = _compile(tmp_path, "int other(void) { return 1; }", name="libcudart.so.13")
    needs = _compile(
        tmp_path, "int other(void); int f(void) { return other(); }", str(dependency), "-Wl,-soname,x", name="needs.so"
    )
    dependency.unlink()
    with pytest.raises(RuntimeUnavailableError, match=r"needs libcudart\.so\.13, .* Install the CUDA libraries"):
        describe_library(needs)

    undefined = _compile(tmp_path, "int missing_one(void); int f(void) { return missing_one(); }", "-Wl,-z,now")
    with pytest.raises(RuntimeUnavailableError, match="undefined symbol missing_one"):
        describe_library(undefined)

    older = _compile(tmp_path, "int RegisterCustomOps(void) { return 0; }", name="older.so")
    with pytest.raises(RuntimeUnavailableError, match="older than this package"):
        describe_library(older)


@pytest.mark.parametrize(
    ("message", "reason", "fix"),
    [
        (
            "/lib/libc.so.6: version `GLIBC_2.38' not found (required by x)",
            "GLIBC_2.38, .* C library is older",
            "Build",
        ),
        ("libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by x)", "GLIBCXX_3.4.32, .* C\\+\\+", "Build"),
        ("libstdc++.so.6: cannot open shared object file: No such file", "needs libstdc\\+\\+.so.6", "libstdc\\+\\+6"),
        ("undefined symbol: RegisterCustomOps", "no onnxruntime op library", "libfptq_ops"),
        ("failed to map segment from shared object", "forbids running code", "noexec"),
        ("libfptq_ops: this onnxruntime is older than 1.23. Install", "older than 1.23", "pip install"),
        ("another copy of onnxruntime in this process", "two copies", "one onnxruntime"),
        (
            "The given version [18] is not supported, only version 1 to 10 is supported in this build.",
            "built for onnxruntime 1.18 only, and this one is 1.10",
            "from 1.23",
        ),
        ("something new", "does not load \\(something new\\)", "Build"),
    ],
)
def test_messages_by_cause(message: str, reason: str, fix: str) -> None:
    import re

    found = explain_load_failure(op_models.library_path(), message)
    assert re.search(reason, found[0]) and re.search(fix, found[1])
