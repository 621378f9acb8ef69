"""Tiny models converted once per test session, and sessions that show what happens inside them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx_ir as ir

import fptq_onnx
from fptq_onnx.convert import Format
from fptq_onnx.graph.activation_groups import group_by_activation
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.graph.producers import find_shift_site
from fptq_onnx.passes.apply_equalization import ApplyEqualizationPass
from fptq_onnx.recipe import Recipe
from fptq_onnx.report import Report

# onnxruntime turns DequantizeLinear + MatMul into its own int8 kernel; level 0 keeps the function bodies' numerics.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}
WINDOWS, LENGTH = 2, 24


@dataclass(frozen=True)
class Converted:
    """One result of `convert`; tests must not change its files."""

    tiny: families.TinyModel
    path: Path
    report: Report

    def run(self, token_ids: np.ndarray, *, library: bool = True) -> np.ndarray:
        """Logits as float32, from the kernels or from the function bodies."""
        opened = fptq_onnx.session(self.path, register_library=library, threads=1, config=EXACT)
        return opened.run(["logits"], self.tiny.feeds(token_ids))[0].astype(np.float32)


def recipe(**overrides: Any) -> Recipe:
    """The paper's recipe on little data, with groups of 32; sections are separated by two underscores."""
    small = {"calibration.windows": WINDOWS, "calibration.length": LENGTH, "weights.group_size": 32}
    return Recipe.load("paper", small | {name.replace("__", "."): value for name, value in overrides.items()})


@functools.cache
def converted(architecture: str, family: str, output_format: Format = "custom", **overrides: Any) -> Converted:
    """Convert a tiny model on random tokens, or return the earlier result."""
    tiny = families.model(architecture, family)
    path = Path(tempfile.mkdtemp(dir=_folder())) / "model.fptq.onnx"
    report = fptq_onnx.convert(
        tiny.path, path, recipe=recipe(**overrides), output_format=output_format, verify_tokens=2 * LENGTH
    )
    return Converted(tiny, path, report)


def values(
    model: ir.Model | Path, names: Sequence[str], feeds: Mapping[str, np.ndarray], *, library: bool = True
) -> dict[str, np.ndarray]:
    """Run a model and return any of its values by name."""
    copy = model.clone() if isinstance(model, ir.Model) else load_model(model)
    found = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [found[name] for name in names]
    opened = fptq_onnx.session(copy, register_library=library, threads=1, config=EXACT)
    return dict(zip(names, opened.run(list(names), dict(feeds)), strict=True))


def constants(model: ir.Model) -> dict[str, np.ndarray]:
    """All initializers by name."""
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference as a fraction of the largest magnitude."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="fptq-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def move_off_zero(model: ir.Model, reach: float) -> int:
    """Move all channels that biases can move, by up to ``reach`` to either side; how many activations that are.

    The model stays the same function. Its residual stream stays small, what the layers read does not.
    """
    linears = find_linears(model)
    groups = [group for group in group_by_activation(linears.layers) if find_shift_site(group, linears).target]
    shifts = {
        str(group.activation.name): np.random.default_rng(seed).uniform(-reach, reach, group.k).astype(np.float32)
        for seed, group in enumerate(groups)
    }
    ApplyEqualizationPass({}, shifts)(model)
    return len(groups)
