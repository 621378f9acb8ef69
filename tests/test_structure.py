"""How the package hangs together: modules depend on each other in one direction only, and stay small."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fptq_onnx

PACKAGE = Path(fptq_onnx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400

# What each part may import of the package, besides itself. `fptq_onnx` is the package's own __init__.
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "report": set(),
    "quantization": {"errors"},
    "recipe": {"errors", "quantization"},
    "graph": {"errors"},
    "ops": {"errors", "fptq_onnx"},  # the package's folder is where the op library lies
    "runtime": {"errors", "ops"},
    "storage": {"errors", "quantization"},
    "calibration": {"errors", "progress", "graph", "quantization", "recipe", "storage"},
    "passes": {"errors", "graph", "quantization", "ops"},
    "planning": {"errors", "graph", "quantization", "recipe"},
    "quantizing": {
        "errors",
        "progress",
        "graph",
        "quantization",
        "recipe",
        "storage",
        "calibration",
        "passes",
        "planning",
    },
    "rewriting": {"passes"},
    "evaluation": {"errors", "progress", "graph", "calibration", "runtime"},
    "genai": {"errors", "graph", "ops", "report"},
    "generation": {"errors", "graph", "evaluation", "genai"},
    "verification": {
        "errors",
        "progress",
        "graph",
        "ops",
        "storage",
        "calibration",
        "evaluation",
        "report",
        "runtime",
    },
    "reporting": {"graph", "quantization", "recipe", "calibration", "passes", "planning", "report"},
    "resources": {"errors", "graph", "recipe"},
    "export": {"errors", "progress", "graph"},
    "packaging": {"errors", "graph", "ops", "generation"},
    "doctor": {"errors", "report", "graph", "ops", "runtime", "calibration", "genai", "generation"},
    "benchmark": {"errors", "progress", "report", "graph", "ops", "runtime", "evaluation", "generation"},
    "analysis": {
        *("errors", "progress", "report", "recipe", "graph", "quantization", "ops", "runtime"),
        *("storage", "calibration", "passes", "planning", "quantizing", "rewriting", "evaluation"),
    },
}
# These see everything but each other, in this order.
LAST = ("convert", "fptq_onnx", "cli")

# The maths knows arrays only.
FOREIGN_TO_MATHS = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "transformers"}
# Extras: without them the rest must still import.
OPTIONAL = {
    "onnxruntime",
    "onnxruntime_genai",
    "torch",
    "transformers",
    "gguf",
    "matplotlib",
    "jinja2",
    "tritonclient",
    "ray",
}


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _part(module: str) -> str:
    """Top-level part of a dotted module: `fptq_onnx.graph.linears` -> `graph`, `fptq_onnx` itself as it is."""
    return module.split(".")[1] if "." in module else module


def _part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return "fptq_onnx" if str(relative) == "__init__.py" else relative.parts[0].removesuffix(".py")


def _imports(path: Path, *, at_top: bool = False) -> Iterator[str]:
    """Modules a file imports; with `at_top` those that importing the file itself imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}: relative import"
            assert node.module is not None
            # `from fptq_onnx import ops` imports a part, `from fptq_onnx.ops import DOMAIN` a name of one.
            if node.module == "fptq_onnx":
                yield from (f"fptq_onnx.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _own(path: Path) -> set[str]:
    return {module for module in _imports(path) if module.split(".")[0] == "fptq_onnx"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_parts_flow_one_way(path: Path) -> None:
    part = _part_of(path)
    imported = {_part(module) for module in _own(path)} - {part}
    if part in LAST:
        assert imported.isdisjoint(LAST[LAST.index(part) :])
    else:
        assert part in ALLOWED, f"say what {part} may import"
        assert imported <= ALLOWED[part], f"{part} must not import {sorted(imported - ALLOWED[part])}"


def test_the_allowed_flow_has_no_cycle() -> None:
    order = list(TopologicalSorter({part: needs - {"fptq_onnx"} for part, needs in ALLOWED.items()}).static_order())
    assert order.index("quantization") < order.index("recipe") < order.index("calibration")
    assert set(ALLOWED) == {_part_of(path) for path in FILES} - set(LAST)


def test_no_two_modules_import_each_other() -> None:
    """Within a part too. A package's __init__ stands for what it imports, so only leaves count."""
    modules = {".".join(("fptq_onnx", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    leaves = {module: path for module, path in modules.items() if path.name != "__init__.py"}
    TopologicalSorter({module: _own(path) & leaves.keys() for module, path in leaves.items()}).prepare()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_what_a_module_may_need(path: Path) -> None:
    modules = set(_imports(path))
    outer = {module.split(".")[0] for module in modules}
    assert not any(module.startswith("onnx.helper") for module in modules)
    assert "onnx.helper" not in path.read_text(encoding="utf-8"), "onnx_ir builds graphs here"
    if _part_of(path) in ("quantization", "recipe", "planning", "errors", "progress", "report"):
        assert outer.isdisjoint(FOREIGN_TO_MATHS)
    if _part_of(path) != "export":
        needed = {module.split(".")[0] for module in _imports(path, at_top=True)}
        assert needed.isdisjoint(OPTIONAL), "import it where it is used"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_public_names_exist() -> None:
    assert fptq_onnx.__all__ == sorted(fptq_onnx.__all__)
    assert all(hasattr(fptq_onnx, name) for name in fptq_onnx.__all__)
    assert (PACKAGE / "py.typed").is_file()


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports test files by their base names; two of one name cannot be collected together."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
