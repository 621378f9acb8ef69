#!/usr/bin/env python3
"""Check the machine code of the CUDA kernels: no spills, no local memory, the intended instructions in the main loops.

    python tools/check_sass.py build/.../libfptq_ops.so
    python tools/check_sass.py build/.../libfptq_ops.so --ptxas-log build.log

Needs no GPU: only a disassembler, `cuobjdump` with `nvdisasm` on PATH or from the PyPI packages nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm. With --ptxas-log the report of `nvcc -Xptxas -v` is read, too. Exit status 1 if something is
amiss.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_bench.tables import markdown_table

__all__ = ["EXPECTATIONS", "Kernel", "disassembler", "faults", "parse_ptxas", "parse_resources", "parse_sass", "read"]

TENSOR = re.compile(r"^(IGMMA|IMMA)\b")
LOCAL = re.compile(r"^(LDL|STL)\b")
HOPPER = r"^sm_90a?$"


@dataclass(frozen=True)
class Expectation:
    """An instruction that every kernel of a name must contain on some architectures.

    Attributes:
        kernel: Pattern of the (mangled) kernel name.
        arch: Pattern of the architecture.
        instruction: Pattern of the instruction.
        in_loop: It must stand in a loop with tensor-core instructions.
    """

    kernel: str
    arch: str
    instruction: str
    in_loop: bool = False


EXPECTATIONS = (
    # Prompt: warpgroup products of int8 weights from registers with uint8 activations from shared memory.
    Expectation("WarpgroupKernel", HOPPER, r"^IGMMA\.64x\d+x32\.S8\.U8\b", in_loop=True),
    Expectation("WarpgroupKernel", HOPPER, r"^LDS\.128\b", in_loop=True),
    Expectation("WarpgroupKernel", HOPPER, r"^UBLKCP\b"),
    Expectation("WarpgroupKernel", HOPPER, r"^UTMALDG\b"),
    # Small batches: warp products, one 16-byte shared load of weights for two of them, bulk copies.
    Expectation("StreamKernel", HOPPER, r"^IMMA\.16832\.S8\.U8\b", in_loop=True),
    Expectation("StreamKernel", HOPPER, r"^LDS\.128\b", in_loop=True),
    Expectation("StreamKernel", HOPPER, r"^UBLKCP\b"),
    # Before Hopper: the same products, fed by asynchronous 16-byte copies.
    Expectation("TileKernel", r"", r"^IMMA\.16832\.S8\.U8\b", in_loop=True),
    Expectation("TileKernel", r"", r"^LDS\.128\b", in_loop=True),
    Expectation("TileKernel", r"", r"^LDGSTS\S*\.128\b"),
    # Activations stream through registers 16 bytes at a time.
    Expectation("QuantizeRows", r"", r"^LDG\S*\.128\b"),
)


@dataclass
class Kernel:
    """One kernel's machine code for one architecture.

    Attributes:
        name: Mangled.
        arch: E.g. "sm_90a".
        resources: REG, STACK, LOCAL, SHARED, ... as cuobjdump names them.
        code: (address, instruction text without predicate), in order.
    """

    name: str
    arch: str
    resources: dict[str, int] = field(default_factory=dict)
    code: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> list[list[str]]:
        """Instructions between each backward branch and its target; the padding at a kernel's end is no loop."""
        found = []
        for address, text in self.code:
            branch = re.match(r"BRA\S* (?:\S+, )?0x([0-9a-f]+)", text)
            if branch and (target := int(branch[1], 16)) < address:
                found.append([body for at, body in self.code if target <= at <= address])
        return found

    def main_loops(self) -> list[list[str]]:
        """The loops that use the tensor cores."""
        return [loop for loop in self.loops() if any(TENSOR.match(text) for text in loop)]

    def has(self, pattern: str, *, in_loop: bool = False) -> bool:
        """Whether an instruction matches anywhere, or in a main loop."""
        bodies: Iterable[str] = (text for _, text in self.code)
        if in_loop:
            bodies = (text for loop in self.main_loops() for text in loop)
        return any(re.match(pattern, text) for text in bodies)


def disassembler() -> tuple[str, dict[str, str]] | None:
    """`cuobjdump` and the environment in which it finds `nvdisasm`, or None where either is missing."""
    folders = [
        *os.environ.get("PATH", "").split(os.pathsep),
        *map(str, Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")),
        "/usr/local/cuda/bin",
    ]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        return None
    return tool, {**os.environ, "PATH": path}


def parse_resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Read `cuobjdump --dump-resource-usage`: (architecture, function) to REG, STACK, LOCAL, ..."""
    arch, name, found = "", "", {}
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            found[arch, name] = {key: int(value) for key, value in re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", line)}
            name = ""
    return found


def parse_sass(text: str) -> list[Kernel]:
    """Read `cuobjdump --dump-sass`."""
    arch, kernels = "", []
    for line in text.splitlines():
        if match := re.match(r"\s*(?:arch = |code for )(\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernels.append(Kernel(match[1], arch))
        elif kernels and (match := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?\s*(\S[^;]*?)\s*;", line)):
            kernels[-1].code.append((int(match[1], 16), match[2]))
    return kernels


def parse_ptxas(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Read `nvcc -Xptxas -v`: (architecture, function) to "stack", "spill_stores", "spill_loads" and "registers"."""
    key, found = ("", ""), {}
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            key = (match[2], match[1])
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            names = ("stack", "spill_stores", "spill_loads")
            found.setdefault(key, {}).update(zip(names, map(int, match.groups()), strict=True))
        elif match := re.search(r"Used (\d+) registers", line):
            found.setdefault(key, {})["registers"] = int(match[1])
    return found


def read(library: Path) -> list[Kernel]:
    """Disassemble a library, object file or cubin.

    Raises:
        RuntimeError: There is no disassembler, it fails, or the file holds no CUDA code.
    """
    found = disassembler()
    if found is None:
        raise RuntimeError("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    tool, environment = found

    def dump(option: str) -> str:
        done = subprocess.run([tool, option, str(library)], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{tool} {option} {library}: {done.stderr.strip()}")
        return done.stdout

    kernels = parse_sass(dump("--dump-sass"))
    if not kernels:
        raise RuntimeError(f"{library}: holds no CUDA machine code")
    resources = parse_resources(dump("--dump-resource-usage"))
    for kernel in kernels:
        kernel.resources = resources.get((kernel.arch, kernel.name), {})
    return kernels


def faults(kernels: Iterable[Kernel], ptxas: Mapping[tuple[str, str], Mapping[str, int]] | None = None) -> list[str]:
    """Everything that breaks the rules, one line each; empty if the code is as intended."""
    found = []
    kernels = list(kernels)
    for kernel in kernels:
        where = f"{kernel.arch} {kernel.name}"
        if not kernel.resources:
            found.append(f"{where}: no resource report")
        found += [
            f"{where}: {name.lower()} memory of {kernel.resources[name]} bytes per thread"
            for name in ("STACK", "LOCAL")
            if kernel.resources.get(name)
        ]
        if any(LOCAL.match(text) for loop in kernel.main_loops() for text in loop):
            found.append(f"{where}: local memory in the main loop")
        for wanted in EXPECTATIONS:
            applies = re.search(wanted.kernel, kernel.name) and re.search(wanted.arch, kernel.arch)
            if applies and _has_body(kernel) and not kernel.has(wanted.instruction, in_loop=wanted.in_loop):
                place = " in the main loop" if wanted.in_loop else ""
                found.append(f"{where}: no {wanted.instruction}{place}")
    present = [kernel.name for kernel in kernels if _has_body(kernel)]
    names = dict.fromkeys(wanted.kernel for wanted in EXPECTATIONS)
    found += [f"no kernel is named {name}" for name in names if not any(re.search(name, other) for other in present)]
    found += [
        f"{arch} {name}: ptxas reports {figures[key]} bytes {key.replace('_', ' ')}"
        for (arch, name), figures in (ptxas or {}).items()
        for key in ("stack", "spill_stores", "spill_loads")
        if figures.get(key)
    ]
    return found


def _has_body(kernel: Kernel) -> bool:
    """A kernel whose architecture lacks its instructions is compiled to an empty body, never launched."""
    return any(re.match(r"(ST|RED|ATOM|UBLKCP|UTMA|IMMA|IGMMA)", text) for _, text in kernel.code)


def _short_name(mangled: str) -> str:
    """The last identifier of a mangled, possibly nested name."""
    position, identifier = len(re.match(r"(_ZN?)?", mangled)[0]), mangled
    while length := re.match(r"\d+", mangled[position:]):
        begin = position + len(length[0])
        position = begin + int(length[0])
        identifier = mangled[begin:position]
    return identifier


def _demangled(text: str) -> str:
    """C++ names in a text made readable, where binutils are installed."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def _table(kernels: Iterable[Kernel]) -> str:
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[_short_name(kernel.name), kernel.arch].append(kernel)
    rows = []
    for (name, arch), members in sorted(groups.items()):
        registers = [kernel.resources.get("REG", 0) for kernel in members]
        opcodes = {
            text.split()[0]
            for kernel in members
            for _, text in kernel.code
            if re.match(r"(IGMMA|IMMA|UBLKCP|UTMALDG|LDGSTS|LDSM|LDS\.128|LDG\S*\.128|LDL|STL)", text)
        }
        rows.append(
            [
                name,
                arch,
                str(len(members)),
                f"{min(registers)}-{max(registers)}",
                str(max(kernel.resources.get("STACK", 0) for kernel in members)),
                " ".join(sorted(opcodes)),
            ]
        )
    return markdown_table(["kernel", "arch", "variants", "registers", "stack", "instructions"], rows)


def main() -> int:
    """Print the table and the faults; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="library, object file or cubin")
    parser.add_argument("--ptxas-log", type=Path, help="output of a build with -Xptxas -v")
    arguments = parser.parse_args()
    try:
        kernels = read(arguments.library)
    except RuntimeError as error:
        print(f"check_sass: {error}", file=sys.stderr)
        return 2
    ptxas = parse_ptxas(arguments.ptxas_log.read_text(encoding="utf-8")) if arguments.ptxas_log else None
    print(_table(kernels))
    found = faults(kernels, ptxas)
    print(_demangled("".join(f"FAULT {line}\n" for line in found)), end="")
    print(f"{len(kernels)} kernels, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
