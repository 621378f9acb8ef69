"""Memory and time of a conversion, before it starts: what the machine has, and what the model will take."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fptq_onnx.errors import RecipeError
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.graph.segments import Segmentation
from fptq_onnx.recipe import Recipe

__all__ = ["Budget", "Estimate", "available_memory", "estimate", "parse_size"]

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
# Python, onnxruntime, onnx and numpy before they see a model, and what allocators keep.
_BASE_BYTES = 400 << 20
# Of each thing that grows with the model, the share of the budget it may take in memory before it goes to disk.
_SHARE = 4
# Arrays of K x K doubles that GPTQ has at a time: the Hessian, its damped copy, the factor and LAPACK's work.
_GPTQ_SQUARES = 5
# Float32 copies of a weight that a rounding makes: the weight, its groups, candidates and their errors.
_ROUNDING_COPIES = 5
_NANOSECONDS = {"absmax7": 30.0, "signed8": 30.0, "mse_clip": 500.0, "weighted_clip": 600.0}


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "8G", "500 MB" or "1000000"; units are powers of 1024.

    Raises:
        RecipeError: It is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"size {text!r}", "it is not a size", "Write it like 8GiB")
    return int(float(found[1]) * 2 ** _UNITS[found[2].lower()])


def available_memory() -> int:
    """Bytes that this process may still take without swapping: of the machine, or of its container."""
    machine = _proc_value(Path("/proc/meminfo"), "MemAvailable:")
    if machine is None:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    return machine if limit is None or used is None else max(min(machine, limit - used), 1 << 30)


@dataclass(frozen=True)
class Budget:
    """How much memory a conversion may take.

    Attributes:
        bytes: In all.
    """

    bytes: int

    @classmethod
    def of(cls, max_memory: int | str | None) -> Budget:
        """The given size, or four fifths of what is free."""
        if max_memory is None:
            return cls(available_memory() * 4 // 5)
        return cls(parse_size(max_memory) if isinstance(max_memory, str) else max_memory)

    @property
    def share(self) -> int:
        """What one kind of data that grows with the model may take."""
        return self.bytes // _SHARE


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take.

    Attributes:
        segments: How the model is cut.
        segment_bytes: Of the most expensive segment, working memory included.
        model_bytes: Weights that lie in the model file itself and so in memory all the time.
        state_bytes: Hidden states of all batches between two segments.
        result_bytes: All quantized weights.
        whole_bytes: What a session of the whole float model takes.
        seconds: Calibration and quantization, by the speed of one small matrix product; right within a factor of two
            or three.
    """

    segments: Segmentation
    segment_bytes: int
    model_bytes: int
    state_bytes: int
    result_bytes: int
    whole_bytes: int
    seconds: float

    def on_disk(self, budget: Budget) -> bool:
        """Whether states and results have to lie on disk."""
        return self.state_bytes + self.result_bytes > budget.share

    def by_blocks(self, budget: Budget) -> bool:
        """Whether the float model does not fit in memory whole, so that it is verified block by block."""
        return self.whole_bytes + self.result_bytes > budget.bytes

    def peak(self, budget: Budget, *, on_disk: bool, verified: bool) -> int:
        """Largest resident set."""
        kept = 0 if on_disk else self.state_bytes + self.result_bytes
        # The quantized model runs beside the float one.
        whole = self.whole_bytes + self.result_bytes if verified and not self.by_blocks(budget) else 0
        return _BASE_BYTES + self.model_bytes + max(self.segment_bytes + kept, whole)

    def describe(self, budget: Budget, *, on_disk: bool, verified: bool) -> str:
        """The estimate in one line.

        Args:
            budget: The memory to plan with.
            on_disk: Whether states and results lie on disk.
            verified: Whether the result is compared with the float model.
        """
        cut = self.segments.description
        peak = self.peak(budget, on_disk=on_disk, verified=verified)
        over = "" if peak <= budget.bytes else f", MORE than the {_size(budget.bytes)} of --max-memory"
        place = "on disk" if on_disk else "in memory"
        return (
            f"estimate: {cut}, peak memory {_size(peak)}{over}, hidden states {_size(self.state_bytes)} and results "
            f"{_size(self.result_bytes)} {place}, about {_duration(self.seconds)} on this machine"
        )


def estimate(
    model: ir.Model,
    segments: Segmentation,
    layers: Sequence[LinearLayer],
    recipe: Recipe,
    tokens: int,
) -> Estimate:
    """Foresee a conversion.

    Args:
        model: The float model.
        segments: How it is cut.
        layers: Its linear layers.
        recipe: The settings.
        tokens: Tokens of the calibration data.
    """
    sizes = {value: value.const_value for value in model.graph.initializers.values() if value.const_value is not None}
    inside = sum(
        tensor.nbytes for tensor in sizes.values() if not isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
    )
    weights = recipe.weights
    moments = weights.needs_moments
    by_segment: dict[int, list[LinearLayer]] = {}
    for layer in layers:
        by_segment.setdefault(segments.of(layer), []).append(layer)
    peak = sum(tensor.nbytes for tensor in sizes.values()) if segments.refused else 0
    for members in by_segment.values():
        floats = sum(layer.k * layer.n for layer in members)
        kept = sum(_itemsize(layer) * layer.k * layer.n for layer in members)
        working = max(4 * _ROUNDING_COPIES * layer.k * layer.n for layer in members)
        if moments:
            squares = [layer.k**2 for layer in {layer.activation: layer for layer in members}.values()]
            held = min(20 * sum(squares), max(int(recipe.calibration.moments_gib * 2**30), 20 * max(squares)))
            working = max(working + 8 * _GPTQ_SQUARES * max(squares) + held, 8 * floats + held)
        # A session holds its weights as they are and once more in the layout, and float type, of its kernels.
        peak = max(peak, kept + max(working, 4 * floats + kept))
    quantized = [layer for layer in layers if not recipe.layers.why_left_out(layer.label, layer.name, layer.role)]
    elements = sum(layer.k * layer.n for layer in quantized)
    hidden = max((layer.k for layer in layers if layer.block is not None), default=0)
    itemsize = max((_itemsize(layer) for layer in layers), default=4)
    narrow = min((layer.k for layer in layers if layer.block is not None), default=hidden)
    return Estimate(
        segments=segments,
        segment_bytes=peak,
        model_bytes=inside,
        state_bytes=tokens * narrow * itemsize * 2 if len(segments) > 1 else 0,
        result_bytes=int(elements * 0.55) if weights.format == "int4" else 0,
        whole_bytes=sum(tensor.nbytes + (4 * tensor.size if tensor.nbytes > 1024 else 0) for tensor in sizes.values()),
        seconds=_seconds(layers, quantized, recipe, tokens),
    )


def _seconds(layers: Sequence[LinearLayer], quantized: Sequence[LinearLayer], recipe: Recipe, tokens: int) -> float:
    speed = _flops()
    elements = sum(layer.k * layer.n for layer in layers)
    passes = 2 if recipe.weights.needs_moments else 1
    forward = passes * (2.0 * elements * tokens / speed + elements * 3e-9)
    if recipe.weights.format == "float":
        return forward
    rounding = sum(_NANOSECONDS[recipe.weights.grid] * 1e-9 * layer.k * layer.n for layer in quantized)
    if recipe.weights.rounding == "gptq":
        once = {layer.activation: layer for layer in quantized}.values()
        rounding *= 2
        rounding += sum(6.0 * layer.k**2 * layer.n for layer in quantized) / speed
        rounding += sum(8.0 * layer.k**3 for layer in quantized) / speed
        rounding += sum(2.0 * layer.k**2 * tokens for layer in once) / speed
    return forward + rounding


def _flops() -> float:
    """Floating-point operations per second of a float32 matrix product here and now."""
    a = np.ones((768, 768), np.float32)
    a @ a
    started = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2.0 * 768**3 / max(time.perf_counter() - started, 1e-6)


def _itemsize(layer: LinearLayer) -> int:
    dtype = layer.weight.dtype
    return 4 if dtype is None else max(1, int(dtype.itemsize))


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _proc_value(path: Path, key: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max": no limit
        return None
