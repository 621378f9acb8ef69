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

__all__ = ["FirstTokenObserver", "SecondMomentObserver", "SplitMoments", "passes_within"]

# One batch in four judges what the others were used for.
HELD_OUT_EVERY = 4

_LARGEST = float(np.finfo(np.float32).max)

# float64 sums for fitting and judging, and the float32 result of a batch.
BYTES_PER_ENTRY = 8 + 8 + 4


class SplitMoments:
    """Moments of one activation over two disjoint sets of batches: one to fit a rounding, one to judge it."""

    def __init__(self, k: int) -> None:
        """Start empty for `k` channels."""
        self.fit = InputMoments(k)
        self.held_out = InputMoments(k)

    def of_batch(self, number: int) -> InputMoments:
        """The set that a batch belongs to; the first batch is number 1."""
        return self.fit if number % HELD_OUT_EVERY else self.held_out


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
        self._cap = np.float32(min(token_cap, _LARGEST))
        self._batches = 0
        self.moments = SplitMoments(k)

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """The matrix [K, K], the sum [K] of the tokens as they are, and their number."""
        (x,) = tokens
        shrink = nodes.op("Div", nodes.constant(self._cap), _peak(nodes, x))
        capped = nodes.op("Mul", x, nodes.op("Min", shrink, nodes.constant(np.float32(1))))
        total = nodes.op("ReduceSum", x, nodes.constant(np.array([0], np.int64)), keepdims=0)
        return _product(nodes, capped), total, nodes.op("Shape", x)

    def fold(self, *arrays: npt.NDArray[Any]) -> None:
        """Add a batch to its set."""
        product, total, shape = arrays
        self._batches += 1
        moments = self.moments.of_batch(self._batches)
        moments.seen += _finite(product, self.values[0])
        moments.total += total
        moments.tokens += int(shape[0])


class FirstTokenObserver(Observer):
    """Adds the first token of every sequence to second moments again, so that it counts more than the others.

    All later tokens of a causal model attend to it (arXiv 2309.17453, 2402.17762), but it is one of hundreds in the
    sum, so a rounding may spoil it for next to nothing. RSQ (arXiv 2503.01820) weighs tokens for the same reason.

    Args:
        observed: The moments of all tokens, observed in the same passes.
        weight: How often the token counts in the end, if it is as large as others or smaller; at least once.
        typical: Largest magnitude of the median token. A first token that is larger, and so counts more as it is, is
            weighed less; infinity weighs all of them fully.
    """

    def __init__(self, observed: SecondMomentObserver, weight: float, typical: float) -> None:
        """Add to the moments of `observed`."""
        super().__init__(*observed.values, tokens=TokenGroup.LEADING)
        self._observed, self._weight = observed, np.float32(weight)
        self._typical = np.float32(min(typical, _LARGEST))
        self._batches = 0

    def reduce(self, nodes: NodeBuilder, *tokens: ir.Value) -> Sequence[ir.Value]:
        """The matrix [K, K]."""
        (x,) = tokens
        one = nodes.constant(np.float32(1))
        root = nodes.constant(np.sqrt(self._weight))
        relative = nodes.op("Min", nodes.op("Div", nodes.constant(self._typical), _peak(nodes, x)), one)
        times = nodes.op("Max", nodes.op("Mul", root, relative), one)
        more = nodes.op("Sqrt", nodes.op("Sub", nodes.op("Mul", times, times), one))
        return [_product(nodes, nodes.op("Mul", x, more))]

    def fold(self, *arrays: npt.NDArray[Any]) -> None:
        """Add a batch to its set."""
        self._batches += 1
        self._observed.moments.of_batch(self._batches).seen += _finite(arrays[0], self.values[0])


def _peak(nodes: NodeBuilder, x: ir.Value) -> ir.Value:
    """Largest magnitude of each token, [T, 1], > 0."""
    peak = nodes.op("ReduceMax", nodes.op("Abs", x), nodes.constant(np.array([-1], np.int64)), keepdims=1)
    return nodes.op("Max", peak, nodes.constant(np.float32(np.finfo(np.float32).tiny)))


def _product(nodes: NodeBuilder, x: ir.Value) -> ir.Value:
    return nodes.op("MatMul", nodes.op("Transpose", x, perm=(1, 0)), x)


def _finite(product: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    if not np.isfinite(product).all():
        raise CalibrationError(
            f"activation {name}",
            "holds NaN, infinity, or values whose squares overflow float32",
            "Check the model in a wider type",
        )
    return product


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
