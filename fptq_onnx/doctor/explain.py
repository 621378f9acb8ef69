"""onnxruntime's messages, turned into a reason and a fix."""

from __future__ import annotations

__all__ = ["explain_cuda_log", "explain_session_error"]

import re
from collections.abc import Callable

_Explanation = tuple[str, str]
_EXTENSIONS = {
    "ai.onnx.contrib": "register onnxruntime-extensions (`pip install onnxruntime-extensions`)",
    "fptq": "register the op library of this package, as new as the model; or convert again to store function bodies",
}


def _unregistered(found: re.Match[str]) -> _Explanation:
    domain, op = found[1], found[2]
    fix = _EXTENSIONS.get(domain, f"register the library that defines the domain {domain}")
    return f"operator {op} of the domain {domain} is not known", fix[:1].upper() + fix[1:]


_PATTERNS: tuple[tuple[str, Callable[[re.Match[str]], _Explanation]], ...] = (
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        lambda m: (
            f"its IR version {m[1]} is newer than this onnxruntime knows ({m[2]})",
            f"Upgrade onnxruntime, or save the model with IR version {m[2]} or older",
        ),
    ),
    (
        r"Opset (\d+) is under development.*?(?:domain (\S+) )?is till opset (\d+)",
        lambda m: (
            f"its opset {m[1]} is newer than this onnxruntime knows ({m[3]})",
            f"Upgrade onnxruntime, or export the model with opset {m[3]} or older",
        ),
    ),
    (r"([\w.]+):(\w+)\(-?\d+\) is not a registered function/op", _unregistered),
    (
        r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'",
        lambda m: (
            f"node {m[2]} ({m[1]}) has types for which no execution provider here has a kernel",
            "Export float32 for the CPU, or use the execution provider that the model was made for",
        ),
    ),
    (
        r"FPTQ_CPU_ISA is '([^']*)'",
        lambda m: (f"the environment variable FPTQ_CPU_ISA asks for {m[1]!r}, which cannot run here", "Unset it"),
    ),
    (
        r"(?i)bad_alloc|failed to allocate memory|out of memory",
        lambda m: ("there is not enough memory", "Close other programs, or use a smaller model or a larger machine"),
    ),
    (
        r"(?i)protobuf parsing failed",
        lambda m: ("the file is damaged or no ONNX model", "Copy or export it again"),
    ),
    (
        r"(?i)external data|External initializer|model_path must not be empty",
        lambda m: ("its external data cannot be read", "Copy the .data file beside the model, under its own name"),
    ),
    (
        r"SIG(KILL)",
        lambda m: ("the system ended the process, most likely for lack of memory", "Use a machine with more memory"),
    ),
    (
        r"SIG(ILL)",
        lambda m: (
            "the process used an instruction that this CPU does not have",
            "Set FPTQ_CPU_ISA=portable and report this with the CPU's name",
        ),
    ),
    (
        r"SIG(SEGV|BUS|ABRT|FPE)",
        lambda m: (
            f"the process crashed (SIG{m[1]})",
            "Copy the model and the library again; if that does not help, report this",
        ),
    ),
)


def explain_session_error(message: str) -> _Explanation:
    """Name the cause of a session that did not open or run.

    Args:
        message: Of onnxruntime's exception, or how the process died.

    Returns:
        The reason, one clause, and the fix in the imperative.
    """
    for pattern, explain in _PATTERNS:
        found = re.search(pattern, message, re.DOTALL)
        if found is not None:
            return explain(found)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"onnxruntime says: {lines[0] if lines else 'nothing'}", "See the reason given by onnxruntime"


def explain_cuda_log(log: str) -> _Explanation:
    """Find in onnxruntime's log why it left the CUDA provider out."""
    found = re.search(r"(\S+\.so[.\d]*): cannot open shared object file", log)
    if found is not None:
        return (
            f"the CUDA provider needs {found[1]}, which the loader does not find",
            "Run `pip install 'onnxruntime-gpu[cuda,cudnn]'` and call onnxruntime.preload_dlls() before the first "
            "session, or add the folder of the CUDA libraries to LD_LIBRARY_PATH",
        )
    found = re.search(r"CUDA (?:failure|error) \d+: ([^;\n]+)", log) or re.search(
        r"(CUDA driver version is insufficient[^;\n]*|no CUDA-capable device[^;\n]*)", log
    )
    if found is not None:
        return f"CUDA says: {found[1].strip()}", "Install or update the NVIDIA driver, and check that nvidia-smi works"
    return "onnxruntime left the CUDA provider out without saying why", "Check that nvidia-smi works, and its driver"
