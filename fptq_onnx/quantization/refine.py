"""Second moments of a layer's inputs, and GPTQ that is kept only where held-out data agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fptq_onnx.quantization.gptq import Order, gptq
from fptq_onnx.quantization.int4 import Float32, Grid, QuantizedWeight, quantize_weight

__all__ = ["InputMoments", "Refined", "refine"]

Float64 = npt.NDArray[np.float64]
Method = Literal["round", "gptq"]


class InputMoments:
    """Sums over tokens that say everything about a linear layer's squared output error.

    Every token counts, the attention sinks at the start of a sequence above all: weights compensated without them lose
    the massive activations that all later tokens attend to, and the model with them.

    Attributes:
        seen: float64 [K, K], X^T X of the layer's inputs.
        total: float64 [K], the sum of the rows seen, none of them capped.
        tokens: Rows summed.
    """

    def __init__(self, k: int) -> None:
        """Start empty for ``k`` channels."""
        self.seen: Float64 = np.zeros((k, k))
        self.total: Float64 = np.zeros(k)
        self.tokens = 0

    def output_shift(self, weight: Float32, quantized: Float32) -> Float32:
        """Mean of X (W - Q) over the tokens seen, float32 [N]: what a bias has to make up for."""
        mean = self.total / max(self.tokens, 1)
        shift: Float32 = (mean @ (weight.astype(np.float64) - quantized)).astype(np.float32)
        return shift

    def output_error(self, weight: Float32, quantized: Float32) -> float:
        """||X (W - Q)||^2 / ||X W||^2 for W, Q [K, N]; 0 for 0/0."""
        w, q = weight.astype(np.float64), quantized.astype(np.float64)
        signal = float(np.sum(w * (self.seen @ w)))
        noise = float(np.sum((w - q) * (self.seen @ (w - q))))
        if signal <= 0:
            return 0.0 if noise <= 0 else float("inf")
        return max(noise, 0.0) / signal


@dataclass(frozen=True, eq=False)
class Refined:
    """The weight kept by `refine`.

    Attributes:
        weight: The quantized weight.
        method: How it was rounded.
        errors: Held-out output error of every method tried.
    """

    weight: QuantizedWeight
    method: Method
    errors: dict[Method, float]

    @property
    def reason(self) -> str:
        """The comparison in words, for the report."""
        listed = ", ".join(f"{method} {error:.3g}" for method, error in self.errors.items())
        return f"held-out output error: {listed}"


def refine(
    weight: Float32,
    fit: InputMoments,
    held_out: InputMoments,
    group_size: int,
    grid: Grid,
    scale_dtype: npt.DTypeLike,
    *,
    damping: float = 0.05,
    order: Order = "activation",
    max_multiple: int = 0,
) -> Refined:
    """Round to nearest and with GPTQ, and keep what errs least on tokens that neither has seen.

    Args:
        weight: float32 [K, N].
        fit: Moments that the rounding may use.
        held_out: Moments that judge it.
        group_size: Rows per scale.
        grid: As for `quantize_weight`; "weighted_clip" weighs by the mean square of the inputs seen.
        scale_dtype: float16, bfloat16 or float32.
        damping: See `gptq`.
        order: See `gptq`.
        max_multiple: See `gptq`.
    """
    tried: dict[Method, QuantizedWeight] = {
        "round": quantize_weight(
            weight, group_size, grid, scale_dtype, importance=np.diag(fit.seen), max_multiple=max_multiple
        ),
        "gptq": gptq(
            weight, fit.seen, group_size, grid, scale_dtype, damping=damping, order=order, max_multiple=max_multiple
        ),
    }
    errors = {method: held_out.output_error(weight, q.dequantize()) for method, q in tried.items()}
    # the first of equals: dictionaries keep their order, and rounding comes first
    method = min(errors, key=lambda m: errors[m])
    return Refined(tried[method], method, errors)
