"""The other ways to multiply by a large weight on one GPU, each over enough weights to stay out of the cache."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable

import torch

from gpu_bench.cublaslt import Int8Product
from gpu_bench.problem import Shape, random_activations

__all__ = [
    "COLD_BYTES",
    "PEERS",
    "Call",
    "Copy",
    "Peer",
    "PeerUnavailableError",
    "cold_copies",
    "copy",
]

Call = Callable[[], object]

# Four times the 60 MB of a Hopper's L2: no weight is still cached when its turn comes again.
COLD_BYTES = 240_000_000


class PeerUnavailableError(RuntimeError):
    """A peer cannot run here or not at this size; the message says why and lands in the record."""


def cold_copies(weight_bytes: int) -> int:
    """How many different weights of this size push each other out of the cache."""
    return max(2, -(-COLD_BYTES // weight_bytes))


class Peer(abc.ABC):
    """One implementation at one shape: weights are made once, calls per token count.

    Attributes:
        contains: What its figure contains besides the product, for the record.
    """

    contains = "product only"

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        """Make the weights."""
        self.shape = shape
        self.generator = generator

    @abc.abstractmethod
    def calls(self, tokens: int) -> list[Call]:
        """One call per weight, all on the same activations [tokens, K]."""

    def _random_weights(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Random [N, K] weights of `dtype`, each different, together at least `COLD_BYTES`."""
        weights = []
        for _ in range(cold_copies(self.shape.k * self.shape.n * dtype.itemsize)):
            weight = torch.randn(
                self.shape.n, self.shape.k, device=self.generator.device, dtype=torch.bfloat16, generator=self.generator
            )
            if dtype == torch.int8:
                weights.append((weight * 30).clamp_(-127, 127).to(torch.int8))
            else:
                weights.append(weight.mul_(self.shape.k**-0.5).to(dtype))
        return weights


class TorchFloat16(Peer):
    """torch.mm (cuBLAS) in float16."""

    dtype = torch.float16

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        """Make the weights."""
        super().__init__(shape, generator)
        self.weights = self._random_weights(self.dtype)

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        x = random_activations(tokens, self.shape.k, self.dtype, self.generator)
        y = torch.empty(tokens, self.shape.n, dtype=self.dtype, device=x.device)
        return [lambda w=w: torch.mm(x, w.t(), out=y) for w in self.weights]


class TorchBfloat16(TorchFloat16):
    """torch.mm (cuBLAS) in bfloat16."""

    dtype = torch.bfloat16


class TorchInt8(Peer):
    """torch._int_mm (cuBLASLt), int8 x int8 to int32; fewer than 32 tokens are padded to 32, its smallest size."""

    contains = "product only, no quantization, int32 output"

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        """Make the weights."""
        super().__init__(shape, generator)
        self.weights = self._random_weights(torch.int8)

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        rows = max(32, tokens)
        x = torch.randn(rows, self.shape.k, device=self.generator.device, generator=self.generator)
        x = (x * 30).clamp_(-127, 127).to(torch.int8)
        y = torch.empty(rows, self.shape.n, dtype=torch.int32, device=x.device)
        return [lambda w=w: torch._int_mm(x, w.t(), out=y) for w in self.weights]


class CublasLtInt8(TorchInt8):
    """cuBLASLt called directly, the fastest of 16 candidates with a workspace, where torch._int_mm takes the first."""

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        rows = max(32, tokens)
        device = torch.device(self.generator.device)
        x = torch.randn(rows, self.shape.k, device=device, generator=self.generator)
        x = (x * 30).clamp_(-127, 127).to(torch.int8)
        y = torch.full((rows, self.shape.n), -1, dtype=torch.int32, device=device)
        product = Int8Product(rows, self.shape.n, self.shape.k, device)
        product.tune(x, self.weights, y)
        product(x, self.weights[0], y)
        if not torch.equal(y, torch._int_mm(x, self.weights[0].t())):
            raise PeerUnavailableError("cuBLASLt's product differs from torch._int_mm's")
        return [lambda w=w: product(x, w, y) for w in self.weights]


class TorchFloat8(Peer):
    """torch._scaled_mm (cuBLASLt), e4m3 x e4m3 to bfloat16 with one scale per operand."""

    contains = "product only, no quantization"

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        """Make the weights."""
        super().__init__(shape, generator)
        self.weights = self._random_weights(torch.float8_e4m3fn)

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        x = random_activations(max(16, tokens), self.shape.k, torch.bfloat16, self.generator).to(torch.float8_e4m3fn)
        one = torch.ones((), device=x.device)
        return [
            lambda w=w: torch._scaled_mm(
                x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            for w in self.weights
        ]


class Humming(Peer):
    """humming-kernels (PyPI, compiled at run time): int4 weights in groups of 128, int8 activations per token."""

    contains = "activation quantization and product"

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        """Quantize and pack the weights with the package's own functions, and check one product."""
        super().__init__(shape, generator)
        os.environ.setdefault("HUMMING_COMPILER", "nvcc")
        try:
            from humming.layer import HummingLayer
        except ImportError as error:
            raise PeerUnavailableError(f"humming-kernels cannot be imported ({error})") from error
        self.layers = []
        try:
            for index in range(cold_copies(shape.int4_bytes)):
                layer = HummingLayer(
                    shape_n=shape.n,
                    shape_k=shape.k,
                    weight_config={"dtype": "int4", "group_size": 128},
                    input_config={"dtype": "int8"},
                    torch_dtype=torch.float16,
                ).cuda()
                weight = torch.randn(shape.n, shape.k, device=generator.device, generator=generator)
                weight = weight.mul_(shape.k**-0.5).half()
                layer.load_from_unquantized(weight)
                layer.transform()
                self.layers.append(layer)
                if index == 0:
                    self._check(weight)
        except (RuntimeError, AssertionError, ValueError, TypeError, OSError) as error:
            raise PeerUnavailableError(f"humming-kernels failed ({str(error).strip().splitlines()[-1:]})") from error

    def _check(self, weight: torch.Tensor) -> None:
        x = random_activations(16, self.shape.k, torch.float16, self.generator)
        expected = x.float() @ weight.float().t()
        error = float((self.layers[0](x).float() - expected).norm() / expected.norm())
        if not error < 0.25:
            raise PeerUnavailableError(f"humming-kernels is off by {error:.2f} of its float product")

    def calls(self, tokens: int) -> list[Call]:
        """See Peer."""
        x = random_activations(tokens, self.shape.k, torch.float16, self.generator)
        y = torch.empty(tokens, self.shape.n, dtype=torch.float16, device=x.device)
        return [lambda layer=layer: layer(x, outputs=y) for layer in self.layers]


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Read and write every byte in a kernel; `Tensor.copy_` becomes a slower memcpy node in a CUDA graph."""
    torch.bitwise_not(source.view(torch.int32), out=target.view(torch.int32))


class Copy(Peer):
    """A device-to-device copy of as many bytes as the 4-bit weight has; it moves each byte twice."""

    contains = "reads and writes K * N / 2 bytes"

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        """Fill the buffers with random bytes."""
        super().__init__(shape, generator)
        self.buffers = [
            torch.randint(
                -128, 127, (shape.int4_bytes,), dtype=torch.int8, device=generator.device, generator=generator
            )
            for _ in range(2 * cold_copies(shape.int4_bytes))
        ]

    def calls(self, tokens: int) -> list[Call]:
        """See Peer; the token count has no part in it."""
        half = len(self.buffers) // 2
        pairs = zip(self.buffers[:half], self.buffers[half:], strict=True)
        return [lambda a=a, b=b: copy(a, b) for a, b in pairs]


PEERS: dict[str, type[Peer]] = {
    "torch fp16": TorchFloat16,
    "torch bf16": TorchBfloat16,
    "torch int8": TorchInt8,
    "cuBLASLt int8": CublasLtInt8,
    "torch fp8": TorchFloat8,
    "humming": Humming,
    "copy": Copy,
}
