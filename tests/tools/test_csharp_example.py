"""Building the C# example: what is rewritten for Mono's compiler, and what is said where none is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import csharp_example
from tools.csharp_example import CSharpError, build, downgrade


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ("if (opts is null && a.b is not Tensor)", "if (opts == null && !(a.b is Tensor))"),
        ("List<int> a = new(3);", "List<int> a = new List<int>(3);"),
        ("x.Select(static ptr => ptr)", "x.Select(ptr => ptr)"),
        ("void F<T>() where T : unmanaged", "void F<T>() where T : struct"),
        ("\n  Buffer.Span[i] = v;", "\n  var span = Buffer.Span; span[i] = v;"),
        ("d[0] = d[1] = n;", "d[0] = n; d[1] = n;"),
        (
            "{ using var a = A(); if (a) { F(); } using var b = B(a); G(); } H();",
            "{ using (var a = A()) { if (a) { F(); } using (var b = B(a)) { G(); } } } H();",
        ),
        ("int i = 1; using (var a = A()) { }", "int i = 1; using (var a = A()) { }"),
    ],
)
def test_newer_constructs_are_rewritten(newer: str, older: str) -> None:
    assert downgrade(newer) == older


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(csharp_example.shutil, "which", lambda name: None)
    with pytest.raises(CSharpError, match=r"neither a \.NET SDK .* Install a \.NET SDK of version 8, or `apt-get"):
        build(tmp_path)


def test_an_sdk_builds_the_project_as_usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for `dotnet`, which writes down how it is called."""
    log = tmp_path / "calls"
    dotnet = tmp_path / "dotnet"
    dotnet.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = --list-sdks ] && echo "8.0.100 [/sdk]"\nexit 0\n')
    dotnet.chmod(0o755)
    monkeypatch.setattr(csharp_example.shutil, "which", lambda name: str(dotnet) if name == "dotnet" else None)
    assert build(tmp_path / "out") == [str(dotnet), str(tmp_path / "out" / "Generate.dll")]
    listed, built = log.read_text().splitlines()
    assert listed == "--list-sdks"
    assert built.startswith("build ") and "Generate.csproj" in built and "-p:FptqOpsLibrary=/" in built


def test_errors_of_the_compiler_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dotnet = tmp_path / "dotnet"
    dotnet.write_text(
        '#!/bin/sh\n[ "$1" = --list-sdks ] && echo 8 && exit 0\necho "a.cs(1,2): error CS1: no"; exit 1\n'
    )
    dotnet.chmod(0o755)
    monkeypatch.setattr(csharp_example.shutil, "which", lambda name: str(dotnet))
    with pytest.raises(CSharpError, match=r"a\.cs\(1,2\): error CS1: no"):
        build(tmp_path / "out")
