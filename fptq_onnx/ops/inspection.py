"""What a built op library says about itself and this machine, and why a file may refuse to load."""

from __future__ import annotations

__all__ = ["Gpu", "LibraryDescription", "Product", "describe_library", "explain_load_failure", "kernel_name"]

import ctypes
import functools
import json
import os
import platform
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from fptq_onnx.errors import RuntimeUnavailableError
from fptq_onnx.ops.library import get_library_path

_BUILD = "build the library on this machine (`pip install --force-reinstall --no-deps .` in a checkout)"
_REBUILD = _BUILD.capitalize()
# e_machine of ELF files and what `platform.machine()` calls them.
_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as the library's own CUDA runtime sees it.

    Attributes:
        index: CUDA's number of the device.
        name: For example "NVIDIA H200".
        capability: 10 * major + minor of the compute capability.
        memory_bytes: Memory of the device.
        kernels: W4A8MatMul kernels that can run there; empty where the device is too old.
    """

    index: int
    name: str
    capability: int
    memory_bytes: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class LibraryDescription:
    """What `FptqDescribeLibrary` reports.

    Attributes:
        path: The library.
        version: Its version.
        cpu_kernels: Instruction sets that this CPU can run, fastest first.
        cpu_kernel: The one that will run; None if FPTQ_CPU_ISA asks for one that cannot.
        cpu_few_rows: The one that takes products of fewer rows than `cpu_few_rows_below`, if another.
        cpu_few_rows_below: See `cpu_few_rows`; 0 if there is none.
        cpu_error: Why `cpu_kernel` is None.
        has_cuda: Whether CUDA kernels were built in.
        gpus: Devices found by it.
        cuda_error: CUDA's reason for finding none, such as a missing driver.
    """

    path: Path
    version: str
    cpu_kernels: tuple[str, ...]
    cpu_kernel: str | None
    cpu_few_rows: str | None
    cpu_few_rows_below: int
    cpu_error: str | None
    has_cuda: bool
    gpus: tuple[Gpu, ...]
    cuda_error: str | None


@dataclass(frozen=True)
class Product:
    """One matrix product of W4A8MatMul or DynamicQuantizeW4A8MatMul.

    Attributes:
        rows: Rows of A, all dimensions but the last together.
        k: Reduced dimension.
        n: Columns of B.
        block_size: Rows of B per scale.
        integer_scales: Whether the scales are integer-structured (attribute `scale_max_multiple`).
        float_bytes: Bytes of one scale: 4 for float32, 2 for float16 and bfloat16.
        quantizes: Whether it is DynamicQuantizeW4A8MatMul.
    """

    rows: int
    k: int
    n: int
    block_size: int
    integer_scales: bool
    float_bytes: int
    quantizes: bool = False


class _CProduct(ctypes.Structure):
    """FptqProduct of fptq_ops.h."""

    _fields_ = (
        ("cuda_device", ctypes.c_int32),
        ("integer_scales", ctypes.c_int32),
        ("float_bytes", ctypes.c_int32),
        ("quantizes", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


def describe_library(path: str | os.PathLike[str] | None = None) -> LibraryDescription:
    """Load an op library into this process, without onnxruntime, and ask it what it can run here.

    Args:
        path: The library, by default the installed one.

    Raises:
        RuntimeUnavailableError: There is none, it does not load, or it is older than this function.
    """
    path = get_library_path() if path is None else Path(path)
    library = _load(path)
    data = json.loads(library.FptqDescribeLibrary().decode(errors="replace"))
    cpu, cuda = data["cpu"], data["cuda"]
    return LibraryDescription(
        path=path,
        version=data["version"],
        cpu_kernels=tuple(cpu["available"]),
        cpu_kernel=cpu["chosen"],
        cpu_few_rows=cpu["few_rows"],
        cpu_few_rows_below=cpu["few_rows_below"],
        cpu_error=cpu["error"],
        has_cuda=cuda is not None,
        gpus=tuple(
            Gpu(gpu["index"], gpu["name"], gpu["capability"], gpu["bytes"], tuple(gpu["kernels"]))
            for gpu in (cuda or {}).get("devices", ())
        ),
        cuda_error=(cuda or {}).get("error"),
    )


def kernel_name(product: Product, cuda_device: int | None = None) -> str:
    """Name of the kernel that the installed library runs for a product.

    Args:
        product: The product.
        cuda_device: Index of the GPU; None for the CPU.

    Returns:
        An instruction set ("avx512vnni") or a CUDA kernel with its tile ("warpgroup 128x256"), and
        "quantizing" where that kernel quantizes its activations itself.

    Raises:
        RuntimeUnavailableError: The library or the device cannot be used.
    """
    path = get_library_path()
    text = ctypes.create_string_buffer(_NAME_BYTES)
    asked = _CProduct(
        -1 if cuda_device is None else cuda_device,
        product.integer_scales,
        product.float_bytes,
        product.quantizes,
        product.rows,
        product.k,
        product.n,
        product.block_size,
    )
    failed = _load(path).FptqDescribeProduct(ctypes.byref(asked), text, _NAME_BYTES)
    name = text.value.decode(errors="replace")
    if failed:
        raise RuntimeUnavailableError(str(path), f"it cannot say which kernel runs: {name}", "Run fptq-onnx doctor")
    return name


def explain_load_failure(path: str | os.PathLike[str], message: str) -> tuple[str, str]:
    """Turn the loader's message about a library into its cause and the fix.

    Args:
        path: The library that was refused.
        message: What dlopen or onnxruntime said, its log included, or by which signal (SIGSEGV) a process that loaded
            it ended.

    Returns:
        The reason, one clause, and the fix in the imperative.
    """
    file = Path(path)
    if fault := _fault_of_file(file):
        return fault
    # What onnxruntime's GetApi writes, in the words of today and of older releases.
    if found := re.search(r"version \[(\d+)\] is not (?:available|supported), only .*?1(?: to |, )(\d+)", message):
        return (
            f"it was built for onnxruntime 1.{found[1]} only, and this one is 1.{found[2]}",
            f"Use the library of this package, which serves any onnxruntime from 1.23: {_BUILD}",
        )
    if found := re.search(r"version [`']((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)'? not found", message):
        what = "C library" if found[1].startswith("GLIBC_") else "C++ library"
        return f"it needs {found[1]}, and this system's {what} is older", _REBUILD
    if found := re.search(r"(\S+?\.so[.\d]*): cannot open shared object file", message):
        missing = Path(found[1]).name
        if missing != file.name:
            return f"it needs {missing}, which the loader does not find", _missing_library_fix(missing)
    if found := re.search(r"undefined symbol: ([\w@.]+)", message):
        if found[1] == "RegisterCustomOps":
            return "it is no onnxruntime op library: it exports no RegisterCustomOps", "Give the path of libfptq_ops"
        return f"it was built against another library version (undefined symbol {found[1]})", _REBUILD
    if "file too short" in message or "invalid ELF" in message or "cannot read file data" in message:
        return "it is damaged", _REBUILD
    if "failed to map segment" in message or "cannot enable executable" in message:
        return "the file system it lies on forbids running code (noexec)", "Copy it to a folder without noexec"
    if "older than 1.23" in message:
        return "this onnxruntime is older than 1.23", "Run `pip install 'onnxruntime>=1.23'` (or onnxruntime-gpu)"
    if "another copy of onnxruntime" in message:
        return "two copies of onnxruntime in one process share it", "Use one onnxruntime per process"
    if found := re.search(r"SIG[A-Z]+", message):
        return f"it crashes while it is loaded ({found[0]})", _REBUILD
    return f"it does not load ({message.strip()})", _REBUILD


def _fault_of_file(file: Path) -> tuple[str, str] | None:
    """What is wrong with the file before any of it runs; mapping a cut-off library would end the process."""
    if not file.is_file():
        return "there is no such file", "Build it with `pip install .`, or check the path"
    try:
        with file.open("rb") as stream:
            header = stream.read(64)
        size = file.stat().st_size
    except OSError as error:
        return f"it cannot be read ({error.strerror})", "Check the permissions of the file and its folders"
    if platform.system() != "Linux":
        return None
    if len(header) < 52 or header[:4] != b"\x7fELF":
        return "it is no Linux library (empty, damaged, or of another system)", _REBUILD
    order = "<" if header[5] == 1 else ">"
    (machine,) = struct.unpack_from(order + "H", header, 18)
    built_for = _MACHINES.get(machine, f"machine {machine}")
    if built_for != platform.machine():
        return f"it was built for {built_for} and this Python is {platform.machine()}", _REBUILD
    # The table of sections comes last in what linkers write. (e_shoff, e_shentsize, e_shnum of a 64-bit header)
    if len(header) == 64 and header[4] == 2:
        (start,) = struct.unpack_from(order + "Q", header, 40)
        entry, count = struct.unpack_from(order + "HH", header, 58)
        if start + entry * count > size:
            return f"it is cut short ({size} bytes of {start + entry * count})", _REBUILD
    return None


def _missing_library_fix(name: str) -> str:
    if name.startswith("libstdc++"):
        return f"Install the C++ runtime (Debian, Ubuntu: `apt install libstdc++6`), or {_BUILD}"
    if name.startswith(("libcud", "libcublas", "libcurand", "libcufft", "libnv")):
        return "Install the CUDA libraries onnxruntime-gpu needs (`pip install onnxruntime-gpu[cuda,cudnn]`)"
    if name.startswith("libonnxruntime"):
        return f"Use the library of this package, which links to no onnxruntime: {_BUILD}"
    return f"Install the package that brings {name}, or add its folder to LD_LIBRARY_PATH"


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    if fault := _fault_of_file(path):
        raise RuntimeUnavailableError(str(path), *fault)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeUnavailableError(str(path), *explain_load_failure(path, str(error))) from error
    try:
        library.FptqDescribeLibrary.restype = ctypes.c_char_p
        library.FptqDescribeProduct.argtypes = [ctypes.POINTER(_CProduct), ctypes.c_char_p, ctypes.c_size_t]
    except AttributeError as error:
        raise RuntimeUnavailableError(
            str(path), "it is older than this package (it cannot describe itself)", _REBUILD
        ) from error
    return library
