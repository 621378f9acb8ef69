"""Tiny models with one planted fault each, and the analysis of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx_ir as ir

from fptq_onnx.analysis.analyze import STEPS, Step, analyze
from fptq_onnx.analysis.result import Analysis
from fptq_onnx.graph.linears import find_linears
from fptq_onnx.graph.model_file import load_model, save_model
from fptq_onnx.graph.opset import ensure_opset
from fptq_onnx.passes.apply_equalization import ApplyEqualizationPass
from fptq_onnx.recipe import Recipe

WINDOW = 32
RECIPE = {"calibration.windows": 4, "calibration.length": WINDOW, "weights.group_size": 32}


@dataclass(frozen=True)
class Analyzed:
    """An analysis of a tiny model, all steps, and where its files are."""

    model: Path
    folder: Path
    report: Path
    work_dir: Path
    analysis: Analysis


def recipe(**overrides: Any) -> Recipe:
    """The paper's recipe on little data; sections are separated by two underscores."""
    return Recipe.load("paper", RECIPE | {name.replace("__", "."): value for name, value in overrides.items()})


def text(folder: Path) -> Path:
    """English in the words of the tokenizer."""
    path = folder / "text.txt"
    path.write_text("\n".join(families._SENTENCES * 8), encoding="utf-8")
    return path


def foreign_text(folder: Path) -> Path:
    """Random characters that no English text holds."""
    path = folder / "foreign.txt"
    letters = np.random.default_rng(0).integers(0x400, 0x4FF, 2000)
    path.write_text("".join(map(chr, letters)), encoding="utf-8")
    return path


def plant(folder: Path, change: Callable[[ir.Model], None], architecture: str = "gpt2") -> Path:
    """A tiny model with a change, its tokenizer beside it."""
    tiny = families.model(architecture, families.DYNAMO)
    model = load_model(tiny.path)
    ensure_opset(model)
    change(model)
    path = folder / "model.onnx"
    save_model(model, path)
    path.with_name("tokenizer.json").write_bytes(tiny.tokenizer.read_bytes())
    return path


def scaled_channels(label: str, channels: Sequence[int], gain: float) -> Callable[[ir.Model], None]:
    """Scale input channels of a layer up and their weight rows down: the same function, other numbers.

    A large gain makes outlier channels, a small one a few weight rows that dwarf the others of their groups.
    """

    def change(model: ir.Model) -> None:
        layer = find_linears(model).by_label()[label]
        scale = np.ones(layer.k, np.float32)
        scale[list(channels)] = 1 / gain
        ApplyEqualizationPass({str(layer.activation.name): scale})(model)

    return change


def tokens_with_an_outlier(ids: Sequence[int], channel: int) -> Callable[[ir.Model], None]:
    """Let the embedding of some tokens be large in one channel."""

    def change(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tuple(tensor.shape) == (families.VOCABULARY, families.HIDDEN):
                table = tensor.numpy().copy()
                table[list(ids), channel] += 6
                value.const_value = ir.Tensor(table, name=value.name)

    return change


def loud_tokens(label: str, ids: Sequence[int], channel: int, gain: float) -> Callable[[ir.Model], None]:
    """Let a layer answer to some tokens alone with outputs many times larger than to all others, in every channel."""

    def change(model: ir.Model) -> None:
        tokens_with_an_outlier(ids, channel)(model)
        layer = find_linears(model).by_label()[label]
        weight = layer.weight_array().astype(np.float32)
        weight[channel] *= gain
        layer.weight.const_value = ir.Tensor(weight, name=layer.weight.name)

    return change


def analyzed(model: Path, folder: Path, *, steps: Sequence[Step] = STEPS, **arguments: Any) -> Analysis:
    """Analyze a tiny model on two windows of English."""
    arguments = {"text": text(folder), "calibration": text(folder), "recipe": recipe()} | arguments
    return analyze(model, folder / "report", steps=steps, tokens=2 * WINDOW, window=WINDOW, **arguments)
