"""Second moments X^T X of activations, accumulated inside the graph: the Hessians of GPTQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.calibration.nodes import NodeBuilder
from fptq_onnx.calibration.observers import Observer, TokenGroup
from fptq_onnx.errors import CalibrationError
from fptq_onnx.quantization.refine import InputMoments

__all__ = ["SecondMomentObserver", "SplitMoments", "passes_within"]

# One batch in four judges what the others were used for.
HELD_OUT_EVERY = 4

# float64 sums for fitting and judging, and the float32 result of a batch.
BYTES_PER_ENTRY = 8 + 8 + 4


class SplitMoments:
    """Moments of one activation over two disjoint sets of batches: one to fit a rounding, one to judge it."""

    def __init__(self, k: int) -> None:
        """Start empty for `k` channels."""
        self.fit = InputMoments(k)
        self.held_out = InputMoments(k)


class SecondMomentObserver(Observer):
    """Sum of x^T x over tokens, each token x scaled down to `token_cap` if its largest magnitude is above.

    A few tokens of a language model (attention sinks) are hundreds of times larger than the rest in a few channels.
    Unscaled they would be all that the sum remembers, and GPTQ would serve them alone.

    Args:
        value: Name of the activation.
        k: Its channels.
        token_cap: Largest magnitude of a token, in units of the activation; infinity for plain sums.
        tokens: Which tokens to sum.
    """

    def __init__(self, value: str, k: int, token_cap: float, tokens: TokenGroup = TokenGroup.ALL) -> None:
        """Start empty."""
        super().__init__(value, tokens=tokens)
        self._cap = np.float32(min(token_cap, float(np.finfo(np.float32).max)))
        self._batches = 0
        self.moments = SplitMoments(k)

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """The matrix [K, K], the sum [K] of the tokens as they are, and their number."""
        (x,) = tokens
        peak = nodes.op("ReduceMax", nodes.op("Abs", x), nodes.constant(np.array([-1], np.int64)), keepdims=1)
        smallest = nodes.constant(np.float32(np.finfo(np.float32).tiny))
        shrink = nodes.op("Div", nodes.constant(self._cap), nodes.op("Max", peak, smallest))
        capped = nodes.op("Mul", x, nodes.op("Min", shrink, nodes.constant(np.float32(1))))
        total = nodes.op("ReduceSum", x, nodes.constant(np.array([0], np.int64)), keepdims=0)
        return nodes.op("MatMul", nodes.op("Transpose", capped, perm=(1, 0)), capped), total, nodes.op("Shape", x)

    def fold(self, *arrays: npt.NDArray[Any]) -> None:
        """Add a batch to its set."""
        product, total, shape = arrays
        if not np.isfinite(product).all():
            raise CalibrationError(
                f"activation {self.values[0]}",
                "holds NaN, infinity, or values whose squares overflow float32",
                "Check the model in a wider type",
            )
        self._batches += 1
        held_out = self._batches % HELD_OUT_EVERY == 0
        moments = self.moments.held_out if held_out else self.moments.fit
        moments.seen += product
        moments.total += total
        moments.tokens += int(shape[0])


def passes_within(channels: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Split activations, in order, into runs whose moments fit `budget` bytes together (one at least per run).

    Args:
        channels: Activation name -> K.
        budget: Bytes.
    """
    run: list[str] = []
    used = 0
    for name, k in channels.items():
        size = BYTES_PER_ENTRY * k * k
        if run and used + size > budget:
            yield run
            run, used = [], 0
        run.append(name)
        used += size
    if run:
        yield run
