"""One opened model, ready to be timed: decoders through their cache, others as a whole."""

from __future__ import annotations

__all__ = ["Subject"]

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.benchmark.results import Kind
from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.language_model import LanguageModel
from fptq_onnx.generation.decoder import Decoder
from fptq_onnx.graph.feeds import ModelInputs

TokenIds = npt.NDArray[np.int64]

_PROBE = 8
# A causal model gives the same logits whatever comes later, up to the noise of dynamic quantization per tensor.
_CAUSAL = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of one round; decode_seconds covers all its steps."""

    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float


class Subject:
    """A session and what it takes to time it.

    Args:
        session: onnxruntime session.
        inputs: Its inputs.
        name: How to name it in errors.

    Raises:
        CalibrationError: It takes no token ids, or an input cannot be filled from them.
        ModelError: It has a cache that no output continues.
    """

    def __init__(self, session: Any, inputs: ModelInputs, name: str) -> None:
        """See the class."""
        self._session, self._inputs, self._name = session, inputs, name
        self._device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
        self._decoder = Decoder(LanguageModel.from_session(session, inputs, name)) if inputs.caches else None
        self._logits = "logits" if _is_logits(session) else None
        self.kind = self._find_kind()

    def run(self, token_ids: TokenIds, new_tokens: int) -> Timing:
        """Time one prompt batch [B, S] and, with a cache, the steps after it.

        Raises:
            CalibrationError: The model does not take these shapes, or fails.
        """
        if self._decoder is None:
            return self._run_whole(token_ids)
        start = time.perf_counter()
        logits = self._decoder.start(list(token_ids), token_ids.shape[1] + new_tokens)
        prefilled = time.perf_counter()
        tokens = logits.argmax(axis=1)
        first = time.perf_counter()
        for _ in range(new_tokens):
            tokens = self._decoder.extend(tokens).argmax(axis=1)
        return Timing(prefilled - start, first - start, time.perf_counter() - first)

    def _run_whole(self, token_ids: TokenIds) -> Timing:
        start = time.perf_counter()
        outputs = self._bound_run(token_ids)
        done = time.perf_counter()
        if self._logits is not None:
            outputs[self._logits].numpy()[:, -1].argmax(axis=1)
        return Timing(done - start, time.perf_counter() - start, 0.0)

    def _bound_run(self, token_ids: TokenIds) -> dict[str, Any]:
        feeds = self._inputs.feeds(token_ids, where=f"{self._name}, batch {token_ids.shape[0]}")
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise CalibrationError(
                f"{self._name}, batch {token_ids.shape[0]}, length {token_ids.shape[1]}",
                f"cannot be run: {error}",
                "Use --lengths and --batches that the model accepts",
            ) from error
        binding.synchronize_outputs()
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _find_kind(self) -> Kind:
        if self._decoder is not None:
            return Kind.DECODER
        if self._logits is None:
            return Kind.ENCODER
        length = self._inputs.window(_PROBE)
        token_ids = np.ones((self._inputs.batch_size or 1, length), np.int64)
        before = self._bound_run(token_ids)[self._logits].numpy()[:, 0].astype(np.float64)
        token_ids[:, -1] = 0
        after = self._bound_run(token_ids)[self._logits].numpy()[:, 0].astype(np.float64)
        same = length > 1 and np.abs(after - before).max() <= _CAUSAL * np.abs(before).max()
        return Kind.DECODER_WITHOUT_CACHE if same else Kind.ENCODER


def _is_logits(session: Any) -> bool:
    return any(output.name == "logits" and len(output.shape or ()) == 3 for output in session.get_outputs())
