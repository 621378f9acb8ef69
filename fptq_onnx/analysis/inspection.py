"""What can be seen of a layer without running the rest of the model: its noise, outliers, tails and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.analysis.segments import Link
from fptq_onnx.analysis.subject import Subject
from fptq_onnx.passes.replace_linears import ActivationQuantizer, StaticQuantizer
from fptq_onnx.quantization.statistics import ActivationStatistics, histogram_edges

__all__ = ["Codes", "Inspection", "clipped_share", "encode", "inspect_segment", "outlier_channels"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# Noise is a ratio of sums over rows; this many tokens give it to a fraction of a dB.
_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Codes:
    """An activation as int8.

    Attributes:
        codes: int16 [tokens, K], -128..127 after the zero point.
        restored: float32, what the codes stand for.
        limit: Largest magnitude that a static scale represents, in units of the activation; None per token.
    """

    codes: npt.NDArray[np.int16]
    restored: Float32
    limit: float | None


def encode(x: Float32, quantizer: ActivationQuantizer) -> Codes:
    """Quantize an activation [tokens, K] as the graph does."""
    if isinstance(quantizer, StaticQuantizer):
        zero = quantizer.zero_point
        codes = np.clip(np.rint(x / np.float32(quantizer.scale)) + zero, 0, 255).astype(np.int16) - np.int16(zero)
        restored = codes.astype(np.float32) * np.float32(quantizer.scale)
        return Codes(codes, restored, quantizer.scale * max(zero, 255 - zero))
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    codes = np.rint(x / scale).astype(np.int16)
    return Codes(codes, codes.astype(np.float32) * scale, None)


@dataclass(frozen=True)
class Inspection:
    """A layer by itself, fed with float activations of the evaluation data.

    Attributes:
        label: Label of the layer.
        snr_db: Signal-to-noise ratio of its output with int8 activations and int4 weights, each token counting alike
            (one attention sink has more energy than all other tokens together, and would hide their noise).
        activation_snr_db: With int8 activations alone.
        weight_snr_db: With int4 weights alone.
        code_use: Share of the 255 int8 codes that hold 95 % of the values (1: the range is used, 0.05: wasted).
        weight_peak: Largest |W| over the root mean square of W (3 to 6 for Gaussian weights).
    """

    label: str
    snr_db: float
    activation_snr_db: float
    weight_snr_db: float
    code_use: float
    weight_peak: float


def inspect_segment(subject: Subject, segment: Link, feeds: Mapping[str, Array]) -> list[Inspection]:
    """Inspect the quantized layers of one segment on one batch."""
    quantized = subject.names(None)
    layers = [layer for layer in subject.linears.layers if layer.name in quantized and layer.name in segment.layers]
    if not layers:
        return []
    inputs = subject.chain.observe(feeds, segment, [str(layer.activation.name) for layer in layers])
    found = []
    for layer in layers:
        x = inputs[str(layer.activation.name)].reshape(-1, layer.k)[:_TOKENS].astype(np.float32)
        seen = encode(x, subject.quantization[layer.name].activation)
        weight, rounded = layer.weight_array(), subject.weight(layer.label)
        kept = weight if rounded is None else rounded.dequantize()
        output = x @ weight
        found.append(
            Inspection(
                layer.label,
                _token_snr_db(output, seen.restored @ kept),
                _token_snr_db(output, seen.restored @ weight),
                _token_snr_db(output, x @ kept),
                _code_use(seen.codes),
                float(np.abs(weight).max() / max(float(np.sqrt(np.mean(np.square(weight, dtype=np.float64)))), 1e-30)),
            )
        )
    return found


def outlier_channels(statistics: ActivationStatistics, most: int = 3) -> list[tuple[int, float]]:
    """Channels of largest magnitude and how many times the median channel's each reaches, largest first."""
    absmax = statistics.channel_absmax
    live = absmax[absmax > 0]
    if not live.size:
        return []
    median = float(np.median(live))
    order = np.argsort(absmax)[::-1][:most]
    return [(int(channel), float(absmax[channel]) / median) for channel in order]


def clipped_share(evaluation: ActivationStatistics, limit: float) -> float:
    """Share of the values of the evaluation data whose magnitude is over `limit`, to the width of a histogram bin."""
    total = int(evaluation.histogram.sum())
    if total == 0 or evaluation.absmax <= limit:
        return 0.0
    # The bin that holds the limit counts as inside, so that a range that fits exactly clips nothing.
    first = int(np.searchsorted(histogram_edges(), limit, side="left"))
    return float(evaluation.histogram[first:].sum()) / total


def _token_snr_db(output: Float32, approximation: Float32) -> float:
    """Ratio in dB of the mean over tokens of each token's own noise to signal; infinity for equality."""
    signal = np.square(output, dtype=np.float64).sum(axis=-1)
    noise = np.square(approximation - output, dtype=np.float64).sum(axis=-1)
    live = signal > 0
    mean = float(np.mean(noise[live] / signal[live])) if live.any() else 0.0
    return float(-10 * np.log10(mean)) if mean else float("inf")


def _code_use(codes: npt.NDArray[np.int16]) -> float:
    return float(np.quantile(np.abs(codes), 0.95)) / 127
