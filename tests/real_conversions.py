"""SmolLM2-135M converted once per test session with a cheap recipe. Tests that use it are marked slow."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import families
import real_model

import fptq_onnx
from fptq_onnx.recipe import Recipe

WINDOWS = 8
RECIPE = Recipe.load("paper", {"weights.grid": "signed8", "calibration.windows": WINDOWS})


@dataclass(frozen=True)
class RealConversion:
    """One result of `convert`; tests must not change its files. Of genai families it is a whole model folder."""

    family: str
    path: Path
    report: fptq_onnx.Report

    @property
    def in_place(self) -> bool:
        return self.family.startswith("genai")


@functools.cache
def converted(family: str) -> RealConversion:
    """Convert SmolLM2 in one graph family."""
    source = real_model.smollm2(family)
    folder = Path(tempfile.mkdtemp(prefix="fptq-smollm2-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    is_folder = family.startswith("genai")
    report = fptq_onnx.convert(
        source.parent if is_folder else source,
        folder if is_folder else folder / "model.onnx",
        calibration=real_model.calibration_text(),
        recipe=RECIPE,
        verify_tokens=512 if family == families.DYNAMO else 0,
    )
    return RealConversion(family, folder / "model.onnx", report)


def tokenizer() -> Path:
    """The tokenizer.json of all families."""
    return real_model.smollm2(families.DYNAMO_KV).with_name("tokenizer.json")
