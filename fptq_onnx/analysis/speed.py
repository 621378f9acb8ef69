"""What a recipe costs in time: kernels timed by onnxruntime's profiler, added up for any plan without running it."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from fptq_onnx.analysis.segments import Link
from fptq_onnx.analysis.subject import Subject
from fptq_onnx.graph.linears import LinearLayer
from fptq_onnx.quantization.policy import Scheme

__all__ = ["CostModel", "Kernel", "OpenProfiled"]

_REPEATS = 4
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Kernel:
    """One node as the runtime ran it.

    Attributes:
        node: Name in the graph (the runtime appends to the names of fused nodes).
        op: Operator that ran.
        provider: Execution provider.
        seconds: Shortest of a few runs on one batch.
    """

    node: str
    op: str
    provider: str
    seconds: float


class OpenProfiled(Protocol):
    """Opens a session that writes a profile with this prefix, such as `Laboratory.open_session`."""

    def __call__(self, model: ir.Model, *, profile: Path | None = None) -> Any:
        """A session."""
        ...


class CostModel:
    """Seconds for one batch under any plan, as the sum over kernels of the same kind and size.

    Layers of one shape take the same time in every block, so each kind is timed where it first occurs and the median
    of all of its occurrences stands for it. That is steadier than timing whole models on a busy machine, and it prices
    plans that were never built. What is not in a linear layer or its quantization is the base, the same in all plans.

    Args:
        subject: Any subject; its float segments give the base.
        feeds: The batch to time.
        open_profiled: Makes sessions that write a profile.
    """

    def __init__(self, subject: Subject, feeds: Mapping[str, Any], open_profiled: OpenProfiled) -> None:
        """Time the float model."""
        self._feeds, self._open = feeds, open_profiled
        # Never changed once known, so that all plans are priced alike.
        self._prices: dict[tuple[object, ...], float] = {}
        self.base = 0.0
        seen: dict[tuple[object, ...], list[float]] = defaultdict(list)
        shapes = {layer.name: ("float", layer.k, layer.n) for layer in subject.linears.layers}
        for segment in subject.chain.segments:
            timed = self._profile(subject, segment, frozenset())
            owners = {kernel.node: _owner(kernel, segment) for kernel in timed}
            for kernel in timed:
                owner = owners[kernel.node]
                if owner is None:
                    self.base += kernel.seconds
                else:
                    seen[shapes[owner]].append(kernel.seconds)
        self._settle(seen)

    def learn(self, subject: Subject, *, every_segment: bool = False) -> list[Kernel]:
        """Time the kinds of kernels of a subject's plan that are not known yet, or all of its segments.

        Returns:
            The kernels of the segments that were run.
        """
        names = subject.names(None)
        layers = {layer.name: layer for layer in subject.linears.layers}
        found: list[Kernel] = []
        seen: dict[tuple[object, ...], list[float]] = defaultdict(list)
        for segment in subject.chain.segments:
            own = names & set(segment.layers)
            kinds = {name: _layer_kind(subject, layers[name]) for name in own}
            activations = {str(layers[name].activation.name): _activation_kind(subject, layers[name]) for name in own}
            wanted = {*kinds.values(), *activations.values()}
            if not own or (not every_segment and wanted <= self._prices.keys() | seen.keys()):
                continue
            timed = self._profile(subject, segment, own)
            for kernel in timed:
                if kernel.node in kinds:
                    seen[kinds[kernel.node]].append(kernel.seconds)
                elif kernel.node.removesuffix(".quantize") in activations:
                    seen[activations[kernel.node.removesuffix(".quantize")]].append(kernel.seconds)
            found += timed
        self._settle(seen)
        return found

    def seconds(self, subject: Subject, kept_float: Iterable[str] = ()) -> float:
        """Seconds for the batch under a subject's plan, with the layers of these labels left float."""
        self.learn(subject)
        quantized = subject.names(None) - {subject.layers[label].name for label in kept_float}
        return self._total(subject, quantized)

    def float_seconds(self, subject: Subject) -> float:
        """Seconds for the batch of the float model."""
        return self._total(subject, frozenset())

    def dynamic_share(self, subject: Subject) -> float:
        """Share of the batch's time that goes into quantizing activations per token."""
        quantized = subject.names(None)
        kinds = {
            str(layer.activation.name): _activation_kind(subject, layer)
            for layer in subject.linears.layers
            if layer.name in quantized
        }
        dynamic = sum(self._typical(kind) for kind in kinds.values() if kind[0] == str(Scheme.PER_TOKEN))
        return dynamic / self._total(subject, quantized)

    def _total(self, subject: Subject, quantized: frozenset[str]) -> float:
        total = self.base
        activations = {}
        for layer in subject.linears.layers:
            if layer.name in quantized:
                total += self._typical(_layer_kind(subject, layer))
                activations[str(layer.activation.name)] = _activation_kind(subject, layer)
            else:
                total += self._typical(("float", layer.k, layer.n))
        return total + sum(self._typical(kind) for kind in activations.values())

    def _settle(self, seen: Mapping[tuple[object, ...], Sequence[float]]) -> None:
        for kind, seconds in seen.items():
            self._prices.setdefault(kind, statistics.median(seconds))

    def _typical(self, kind: tuple[object, ...]) -> float:
        return self._prices.get(kind, 0.0)

    def _profile(self, subject: Subject, segment: Link, names: frozenset[str]) -> list[Kernel]:
        model = subject.chain.model_of(segment, names)
        values = subject.chain.float_values(self._feeds, segment.index)
        with tempfile.TemporaryDirectory(prefix="fptq-profile-") as folder:
            session = self._open(model, profile=Path(folder) / "profile")
            feeds = {name: values[name] for name in segment.inputs}
            for _ in range(_REPEATS):
                session.run(list(segment.outputs), feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _kernels(events)


def _kernels(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """The nodes of a profile, each with its shortest run."""
    best: dict[str, Kernel] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_KERNEL):
            continue
        node, arguments = name.removesuffix(_KERNEL), event["args"]
        kernel = Kernel(node, arguments["op_name"], arguments["provider"], float(event["dur"]) * 1e-6)
        if node not in best or kernel.seconds < best[node].seconds:
            best[node] = kernel
    return list(best.values())


def _owner(kernel: Kernel, segment: Link) -> str | None:
    """The linear layer that a float kernel computes; fusions keep the name of the MatMul in front of theirs."""
    if not any(part in kernel.op for part in ("MatMul", "Gemm")):
        return None
    exact = [name for name in segment.layers if kernel.node == name]
    fused = [name for name in segment.layers if kernel.node.startswith((f"{name}/", f"{name}_"))]
    return next(iter([*exact, *sorted(fused, key=len, reverse=True)]), None)


def _layer_kind(subject: Subject, layer: LinearLayer) -> tuple[object, ...]:
    entry, weights = subject.entry(layer.label), subject.recipe.weights
    if entry.weight_method == "float":
        return ("float", layer.k, layer.n)
    if entry.weight_method == "int8":
        return ("W8A8", layer.k, layer.n)
    return ("W4A8", layer.k, layer.n, min(entry.group_size, layer.k), weights.scale_max_multiple)


def _activation_kind(subject: Subject, layer: LinearLayer) -> tuple[object, ...]:
    scheme = subject.entry(layer.label).scheme
    return (str(Scheme.STATIC if scheme.is_static else scheme), layer.k)
