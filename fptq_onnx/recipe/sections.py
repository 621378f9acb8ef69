"""The sections of a recipe: every choice of a conversion with its default, its meaning and its source."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fptq_onnx.quantization.gptq import Order
from fptq_onnx.quantization.int4 import MAX_MULTIPLE, Grid
from fptq_onnx.quantization.policy import EqualizationMethod
from fptq_onnx.quantization.static_range import RangeMethod

__all__ = [
    "ActivationRecipe",
    "CalibrationRecipe",
    "EqualizationRecipe",
    "FallbackRecipe",
    "LayersRecipe",
    "RotationRecipe",
    "Section",
    "VerificationRecipe",
    "WeightRecipe",
]


class Section(BaseModel):
    """Immutable, unknown fields are errors, and docstrings of fields are their descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ActivationRecipe(Section):
    """How activations become int8."""

    scheme: Literal["policy", "static", "equalized-static", "per-token", "float"] = "policy"
    """"policy" chooses per activation by its range (FPTQ). The others apply one scheme to every
    activation, for comparison: "static" is plain per-tensor int8, "equalized-static" equalizes everything,
    "float" leaves activations alone."""

    v0: float = Field(default=15.0, ge=0)
    """Range up to which an activation is quantized per tensor as it is (FPTQ)."""

    v1: float = Field(default=150.0, ge=0)
    """Range from which on an activation is quantized per token; between v0 and v1 it is equalized first (FPTQ)."""

    range: Literal["absmax", "span"] = "absmax"
    """What v0 and v1 are compared with: max |X|, or max X - min X. FPTQ's text says "range" and its figures show max
    |X|."""

    static_range: RangeMethod | Literal["output"] = "absmax"
    """Clip range of static activations: everything observed, the percentile below, or the range of least squared
    error over the histogram (TensorRT's and onnxruntime's calibrators have the same three families). "output": for each
    activation "absmax" or "mse", whichever moves the outputs of the layers behind it less, on a sample of tokens."""

    percentile: float = Field(default=99.99, gt=50, le=100)
    """Per cent of the values that static_range "percentile" keeps inside."""

    leading_tokens: int = Field(default=0, ge=0)
    """Positions at the start of each calibration sequence that are left out of the statistics. The first tokens of a
    language model carry attention-sink activations hundreds of times larger than the rest (arXiv 2402.17762)."""

    symmetric: bool = True
    """Zero point 128 for every static activation (FPTQ). False fits scale and zero point to the observed range."""

    @model_validator(mode="after")
    def _ordered(self) -> ActivationRecipe:
        if self.v1 < self.v0:
            raise ValueError(f"v1 ({self.v1:g}) is smaller than v0 ({self.v0:g})")
        return self


class EqualizationRecipe(Section):
    """How the middle bucket of the policy is evened out before static quantization."""

    method: EqualizationMethod | Literal["search"] = "lae"
    """"lae": s = m / log2(2 + m) with m the channel's max |X| (FPTQ). "smoothquant": s = m^alpha /
    max|W|^(1 - alpha) (arXiv 2211.10438). "none": the middle bucket is quantized per token instead. "search": each
    activation between v0 and v1 gets whichever of none, LAE and SmoothQuant at three strengths lets its quantized
    layers err least on a sample of tokens, or per-token scales where even that errs `tolerance` times as much."""

    tolerance: float = Field(default=1.25, ge=1)
    """"search": error of the best static choice, over that of per-token quantization, up to which it is taken."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """SmoothQuant's migration strength (arXiv 2211.10438)."""

    floor: float = Field(default=1e-2, ge=0, le=1)
    """Smallest scale as a fraction of the median scale, so that channels silent in calibration are not amplified
    without bound."""

    scale_bits: int = Field(default=8, ge=0, le=24)
    """Significant bits that the scales keep, 0 for all: exports of one model whose statistics differ in the last bits
    then get the same weights. Eight bits move a scale by 0.4 per cent at most. A shift keeps as many bits of half its
    channel's width."""

    shift: bool = False
    """Also try every activation less the middle of each channel's range (Outlier Suppression+, arXiv 2304.09145), and
    keep that where the quantized layers err less on a sample of tokens; "search" tries each of its choices so. Offered
    only where it costs nothing at run time: where a LayerNorm's bias or that of the value projection takes the shift
    and every layer behind has a bias for what it loses. Models with RMSNorm, or without biases, have no such place."""


class RotationRecipe(Section):
    """Orthogonal changes of coordinates that spread outlier channels, folded into the weights before calibration.

    A model whose architecture does not allow one is converted without it; the report says why.
    """

    residual: bool = False
    """Rotate the residual stream of an RMSNorm decoder (QuaRot, arXiv 2404.00456; SpinQuant's R1, arXiv 2405.16406).
    Embedding and head stay as they are: two float MatMuls of hidden x hidden turn the stream there and back."""

    heads: bool = False
    """Rotate the value heads and undo it in the output projection (SpinQuant's R2). Changes what a key-value cache
    holds, not what the model computes."""


class WeightRecipe(Section):
    """How weights become int4."""

    format: Literal["int4", "float"] = "int4"
    """"float" keeps all weights: only activations are quantized, which separates the two losses."""

    group_size: Literal[32, 64, 128, "channel"] = 128
    """Consecutive input channels that share a scale; "channel" is one scale per output channel. FPTQ uses 128."""

    grid: Grid = "absmax7"
    """"absmax7": scale absmax/7, integers -7..7 (FPTQ). "signed8": the value of largest magnitude becomes -8, the
    scale may be negative (llama.cpp's Q4_0). "mse_clip": the clip range of least squared weight error.
    "weighted_clip": of least error weighed by the mean square of each input channel (llama.cpp's imatrix, AWQ)."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """"gptq" rounds the weights of a layer one row at a time and moves each row's error onto the rows still to come, by
    the second moments of the layer's inputs (arXiv 2210.17323). It is kept only where held-out calibration batches
    agree that it errs less than rounding to nearest."""

    damping: float = Field(default=0.05, gt=0, le=1)
    """GPTQ: fraction of the mean of the Hessian's diagonal that is added to the diagonal."""

    order: Order = "activation"
    """GPTQ: "activation" rounds the input channels of largest second moment first, with scales of the original weight;
    "natural" goes through the channels as they lie and fits each group's scale to what is left then."""

    token_cap: float = Field(default=16.0, ge=0)
    """Tokens whose largest magnitude is over this multiple of the median token's are scaled down to it in the second
    moments, so that attention sinks do not decide alone; 0 counts all tokens fully. Equalized activations need none;
    models without sinks come out the same."""

    first_token_weight: float = Field(default=1.0, ge=1)
    """How often the first token of every calibration sequence counts in the second moments. All later tokens attend to
    it, so its error costs more than its share of the sum; above all where a rotation spreads what the norm's weight
    kept small (RSQ weighs tokens for the same reason, arXiv 2503.01820)."""

    scales: Literal["float", "integer"] = "float"
    """"integer": the scales of a column are base * i with |i| in 1..15, so that kernels can accumulate all of K in one
    int32 (QoQ's two-level scales, arXiv 2405.04532)."""

    bias_correction: bool = False
    """Shift each bias by what rounding the weight moves the mean of the layer's output (arXiv 1906.04721). Layers
    without a bias are left alone: an Add of their own would cost time."""

    def block_size(self, k: int) -> int:
        """Rows per scale for a weight of ``k`` rows."""
        return k if self.group_size == "channel" else self.group_size

    @property
    def needs_moments(self) -> bool:
        """Whether quantizing a weight takes the second moments of its inputs."""
        return self.format == "int4" and (
            self.rounding == "gptq" or self.grid == "weighted_clip" or self.bias_correction
        )

    @property
    def scale_max_multiple(self) -> int:
        """The attribute of W4A8MatMul: 15 for integer scales, else 0."""
        return MAX_MULTIPLE if self.scales == "integer" else 0


class LayersRecipe(Section):
    """Which linear layers are quantized."""

    include: tuple[str, ...] = (".*",)
    """Regular expressions; a layer is a candidate if one of them matches its label ("block.3.q") or node name from the
    start."""

    exclude: tuple[str, ...] = ()
    """Regular expressions of layers that stay float although included."""

    lm_head: Literal["float", "int8", "int4"] = "float"
    """The output projection: float as FPTQ leaves it, int8 with a scale per token of the vocabulary, or int4 like the
    other layers."""

    embedding: Literal["float", "int8", "int4"] = "float"
    """The table that token ids are looked up in: float, int8 with a scale per token, or int4 in groups of
    `weights.group_size` along the hidden axis, clipped for least squared error (llama.cpp and onnxruntime-genai's
    builder offer both for embeddings). With a head of the same (tied) weights and the same choice the file holds one
    table for both, quantized for the head."""

    @field_validator("include", "exclude")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return patterns

    def weight_method(self, role: str, weights: WeightRecipe) -> Grid | Literal["float", "int8"]:
        """How the weight of a layer that takes part is stored."""
        if weights.format == "float":
            return "float"
        return "int8" if role == "lm_head" and self.lm_head == "int8" else weights.grid

    def why_left_out(self, label: str, name: str, role: str) -> str | None:
        """Why a layer stays float, or None if it is to be quantized."""

        def match(patterns: tuple[str, ...]) -> str | None:
            return next((p for p in patterns if re.match(p, label) or re.match(p, name)), None)

        if role == "lm_head" and self.lm_head == "float":
            return "the recipe keeps lm_head float"
        if match(self.include) is None:
            return "no include pattern matches"
        excluded = match(self.exclude)
        return None if excluded is None else f"excluded by {excluded!r}"


class CalibrationRecipe(Section):
    """How much data is observed."""

    windows: int = Field(default=16, ge=1)
    """Sequences of calibration text or random tokens.

    The publication gives no number. 16 is the best of 8, 16, 32 and 64 for `paper` on SmolLM2 (three draws each, judged
    on text that is neither calibrated on nor reported): with more text absmax ranges only grow, static scales get
    coarser.
    """

    length: int = Field(default=512, ge=1)
    """Tokens per sequence; shortened to what the model accepts."""

    sample_tokens: int = Field(default=256, ge=1)
    """Tokens kept of each activation where choices are made by the output error of its layers."""

    moments_gib: float = Field(default=2.0, gt=0)
    """Memory for second moments in GiB. Activations that do not fit together are observed in further passes."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random: which windows of the text, random tokens, random signs."""


class FallbackRecipe(Section):
    """Which layers leave int4 weights or static activations: static -> per token -> int8 weight -> float.

    Layers are ranked by the relative error of their own output on a sample of tokens.
    """

    float_layers: int = Field(default=0, ge=0)
    """This many layers of largest output error stay float."""

    rounds: int = Field(default=0, ge=0)
    """How often to convert again, with layers taken down the chain, while the model misses verification.max_kl. The sum
    of the layers' errors is brought down in the proportion in which the divergence was missed."""


class VerificationRecipe(Section):
    """When the converted model is accepted."""

    max_kl: float | None = Field(default=None, gt=0)
    """Largest mean KL divergence per token, in nats, of the converted from the float model; None reports it only."""
