"""What a benchmark measured, and the settings it was asked for."""

from __future__ import annotations

__all__ = [
    "BenchmarkReport",
    "Case",
    "CaseResult",
    "Kind",
    "LayerTime",
    "MemoryUse",
    "ModelResult",
    "OpTime",
    "PhaseProfile",
    "Settings",
    "Spread",
]

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fptq_onnx.runtime import Provider


class Kind(StrEnum):
    """What a model is, as far as timing it goes."""

    DECODER = "decoder"
    """A causal language model with a key/value cache: prefill, then one token a step."""
    DECODER_WITHOUT_CACHE = "decoder without cache"
    """A causal language model that would run the whole text again for each token: prefill only."""
    ENCODER = "encoder"
    """Anything else that reads tokens: sequences per second."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        lengths: Prompt lengths in tokens; None for 128 and 512, as far as the models' positions allow.
        batches: Sequences that run together; None for 1, or what a model fixes.
        new_tokens: Decode steps after each prompt.
        rounds: Timed runs of every case and model, interleaved.
        warmup: Runs of every case and model before them.
        threads: Intra-op threads, None for onnxruntime's choice.
        provider: "cpu" or "cuda".
        library: Register the op library for models with its ops; False times their function bodies.
        profile: Also run the smallest case under onnxruntime's profiler.
        seed: Of the random token ids.
    """

    lengths: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    new_tokens: int = 32
    rounds: int = 5
    warmup: int = 1
    threads: int | None = None
    provider: Provider = "cpu"
    library: bool = True
    profile: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One shape of work: `batch` prompts of `length` tokens, then `new_tokens` steps."""

    batch: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Spread:
    """Median of the rounds with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize one value per round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class MemoryUse:
    """Memory of the process that ran one model and nothing else.

    Attributes:
        process_bytes: Largest resident set, weights mapped from files included.
        before_bytes: Resident set before the model was opened: Python and onnxruntime.
        gpu_bytes: Device memory that this process took; None on the CPU.
    """

    process_bytes: int
    before_bytes: int
    gpu_bytes: int | None = None

    @property
    def model_bytes(self) -> int:
        """What the model added."""
        return self.process_bytes - self.before_bytes


@dataclass(frozen=True)
class CaseResult:
    """One case of one model; figures of decoding are None for models without cache.

    Attributes:
        case: The case.
        prefill: Prompt tokens per second, all sequences together.
        sequences: Sequences per second of an encoder, None for others.
        first_token_ms: From token ids to the first new token of every sequence; None for encoders.
        decode: New tokens per second, all sequences together.
        step_ms: One decode step.
        memory: Peak while this case ran.
        prefill_ratio: Speed of prefill over that of the model compared with, round by round; None without one.
        decode_ratio: The same of decoding.
    """

    case: Case
    prefill: Spread
    sequences: Spread | None
    first_token_ms: Spread | None
    decode: Spread | None
    step_ms: Spread | None
    memory: MemoryUse
    prefill_ratio: Spread | None = None
    decode_ratio: Spread | None = None


@dataclass(frozen=True)
class OpTime:
    """All nodes of one operator on one execution provider in one run.

    Attributes:
        op: Operator type.
        provider: Execution provider that ran it.
        nodes: Number of nodes.
        microseconds: Their time together, of one run.
        share: Of the time of all nodes.
    """

    op: str
    provider: str
    nodes: int
    microseconds: float
    share: float


@dataclass(frozen=True)
class LayerTime:
    """One linear layer in one run.

    Attributes:
        label: Name that is the same in every export, such as "block.3.down".
        node: Name of the node that ran.
        op: Operator type that onnxruntime made of it.
        provider: Execution provider.
        kernel: Kernel of this package's ops, "accuracy level 4" and the like of MatMulNBits; None where nothing tells.
        rows: Rows of the activation, all dimensions but the last together.
        microseconds: Time of one run.
        share: Of the time of all nodes.
    """

    label: str
    node: str
    op: str
    provider: str
    kernel: str | None
    rows: int
    microseconds: float
    share: float


@dataclass(frozen=True)
class PhaseProfile:
    """Where the time of prefill or of one decode step goes.

    Attributes:
        run_microseconds: The whole run.
        node_microseconds: Sum over nodes; the rest is onnxruntime's own work between them.
        ops: By operator and provider, longest first.
        layers: Linear layers in execution order.
    """

    run_microseconds: float
    node_microseconds: float
    ops: tuple[OpTime, ...]
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Attributes:
        path: The file.
        kind: What it is.
        note: What could not be measured and why; None if everything was.
        providers: Execution providers of its session.
        library: Whether the op library was registered.
        file_bytes: The ONNX file and its external data.
        load_seconds: Opening the session.
        cold_first_token_ms: The first run of the session, not warmed up.
        memory: Largest of all cases, loading included.
        cases: One result per case.
        profile_case: The case that was profiled.
        prefill_profile: Its prefill; None if not profiled.
        decode_profile: Its decode step; None if not profiled or without cache.
    """

    path: str
    kind: Kind
    note: str | None
    providers: tuple[str, ...]
    library: bool
    file_bytes: int
    load_seconds: float
    cold_first_token_ms: float
    memory: MemoryUse
    cases: tuple[CaseResult, ...]
    profile_case: Case | None = None
    prefill_profile: PhaseProfile | None = None
    decode_profile: PhaseProfile | None = None


@dataclass(frozen=True)
class BenchmarkReport:
    """Everything measured; ratios are to the first model compared with.

    Attributes:
        models: The model that was asked for, then those it is compared with.
        settings: What was asked for.
        cores: Cores that this process may use.
        versions: Python, platform and packages.
    """

    models: tuple[ModelResult, ...]
    settings: Settings
    cores: int
    versions: dict[str, str]
