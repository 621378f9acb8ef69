"""Memory of this process, and of the GPU as far as this process took it."""

from __future__ import annotations

__all__ = ["GpuMeter", "peak_bytes", "reset_peak", "resident_bytes"]

import ctypes
import re
from pathlib import Path

from fptq_onnx.report import peak_memory_bytes

_STATUS = Path("/proc/self/status")
_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident set of this process now; its peak where the system does not tell (not Linux)."""
    return _field("VmRSS") or peak_memory_bytes()


def peak_bytes() -> int:
    """Largest resident set since the last `reset_peak`."""
    # getrusage would also count what the process was before it started this program.
    return _field("VmHWM") or peak_memory_bytes()


def reset_peak() -> None:
    """Let `peak_bytes` start again at what is resident now; does nothing where the system cannot (not Linux)."""
    try:
        _REFS.write_text("5", encoding="ascii")
    except OSError:
        return


def _field(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class GpuMeter:
    """Memory that disappeared from GPU 0 since the meter was made; other processes there disturb it.

    onnxruntime's arena does not give memory back, so what is taken at the end was the peak.
    """

    def __init__(self) -> None:
        """Note what is free. Needs a driver: make it after the provider was found to work."""
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        self._driver.cuInit(0)
        self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), 0)
        self._free = self._now()

    def taken_bytes(self) -> int:
        """Bytes taken since."""
        return self._free - self._now()

    def _now(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        previous = ctypes.c_void_p()
        self._driver.cuCtxPushCurrent_v2(self._context)
        self._driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(previous))
        return free.value
