"""One decoder session with its key/value cache: tokens in, the logits of the next token out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.evaluation.language_model import LanguageModel
from fptq_onnx.graph.feeds import ModelInput

__all__ = ["Decoder"]

Array = npt.NDArray[Any]
TokenIds = npt.NDArray[np.int64]

_BRANCH = "use_cache_branch"  # optimum's merged decoders: whether there is a past


class Decoder:
    """A batch of sequences that grow together.

    The cache never leaves the device. Where attention is GroupQueryAttention one buffer per layer is read and appended
    to in place, as onnxruntime-genai does; elsewhere each step's `present` outputs are the next step's `past` inputs.

    Args:
        model: A causal language model with cache inputs; its session says on which device the cache lies.

    Raises:
        ModelError: The model has no cache, or an input of a cache has no output that continues it.
    """

    def __init__(self, model: LanguageModel) -> None:
        """See the class."""
        self._model = model
        self._on_cuda = "CUDAExecutionProvider" in model.session.get_providers()
        outputs = [output.name for output in model.session.get_outputs()]
        self._present = {spec.name: _continuation(spec, outputs, model.name) for spec in model.inputs.caches}
        if model.inputs.token_input is None or not self._present:
            missing = "token ids" if self._present else "a key/value cache"
            raise ModelError(model.name, f"has no input of {missing}", "Export it as a decoder with key/value cache")
        self._tokens = model.inputs.token_input
        self._cache: dict[str, Any] = {}
        self._mask: Array = np.zeros((0, 0), np.int64)
        self._capacity = 0

    @property
    def length(self) -> int:
        """Tokens that the cache holds of the longest sequence, padding included."""
        return int(self._mask.shape[1])

    def start(self, prompts: Sequence[npt.ArrayLike], capacity: int) -> Array:
        """Forget all sequences and run new prompts, of any lengths, as one batch.

        Args:
            prompts: Token ids, one sequence per prompt.
            capacity: Most tokens of a sequence, prompt and continuation together, that will be run.

        Returns:
            Logits [B, vocabulary] of the token after each prompt, in the model's type.

        Raises:
            CalibrationError: A prompt is empty, does not fit the model or `capacity`, or the model fails.
        """
        ids = [np.asarray(prompt, np.int64).ravel() for prompt in prompts]
        if not ids or min(map(len, ids)) == 0:
            raise CalibrationError("prompt", "holds no token", "Give at least one token per prompt")
        batch, longest = len(ids), max(map(len, ids))
        limit = self._model.inputs.positions
        if longest > capacity or (limit is not None and capacity > limit):
            raise CalibrationError(
                "prompt",
                f"and its continuation take {max(longest, capacity)} tokens, the model "
                f"{'is given' if limit is None else 'has'} {capacity if limit is None else limit} positions",
                "Use a shorter prompt or fewer new tokens",
            )
        tokens = np.zeros((batch, longest), np.int64)
        mask = np.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            # GroupQueryAttention counts a sequence's tokens from the left; other graphs attend by the mask.
            place = slice(0, len(prompt)) if self._model.inputs.in_place else slice(longest - len(prompt), longest)
            tokens[row, place], mask[row, place] = prompt, 1
        self._capacity = capacity
        self._mask = mask[:, :0]
        self._cache = {spec.name: self._new_cache(spec, batch) for spec in self._model.inputs.caches}
        last = mask.sum(axis=1) - 1 if self._model.inputs.in_place else np.full(batch, longest - 1)
        return self._run(tokens, mask, last)

    def extend(self, tokens: npt.ArrayLike) -> Array:
        """Append tokens to every sequence.

        Args:
            tokens: Token ids [B] or [B, S]; the same number for every sequence.

        Returns:
            Logits [B, vocabulary] of the token after the last one, in the model's type.

        Raises:
            CalibrationError: The tokens do not fit the batch or the capacity given to `start`, or the model fails.
        """
        batch = self._mask.shape[0]
        ids = np.asarray(tokens, np.int64)
        ids = ids[:, None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != batch:
            raise CalibrationError(
                "tokens", f"have shape {list(np.shape(tokens))} in a batch of {batch}", "Give one row per sequence"
            )
        if self.length + ids.shape[1] > self._capacity:
            raise CalibrationError(
                "tokens", f"exceed the capacity of {self._capacity} tokens", "Start with a larger capacity"
            )
        return self._run(ids, np.ones_like(ids), np.full(batch, ids.shape[1] - 1))

    def _run(self, tokens: TokenIds, mask: Array, last: npt.NDArray[np.int64]) -> Array:
        model, inputs = self._model, self._model.inputs
        where = f"{tokens.shape[1]} tokens after {self.length}"
        past, self._mask = self.length, np.concatenate([self._mask, mask], axis=1)
        given = {self._tokens.name: tokens.astype(self._tokens.dtype or np.int64)}
        if inputs.mask_input is not None:
            given[inputs.mask_input.name] = self._mask.astype(inputs.mask_input.dtype or np.int64)
        elif not self._mask.all():
            raise CalibrationError(model.name, "takes no attention mask", "Run prompts of one length together")
        if _BRANCH in inputs.names:
            given[_BRANCH] = np.array([past > 0])
        feeds = inputs.complete(given, where)
        binding = model.session.io_binding()
        for name, array in feeds.items():
            if name not in self._cache:
                binding.bind_cpu_input(name, array)
        binding.bind_output(model.logits, "cpu")
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            if inputs.in_place:
                binding.bind_ortvalue_output(self._present[name], value)
            else:
                binding.bind_output(self._present[name], "cuda" if self._on_cuda else "cpu")
        try:
            model.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise CalibrationError(
                f"{model.name}, {where}", f"cannot be run: {error}", "See the reason given by onnxruntime"
            ) from error
        logits, *present = binding.get_outputs()
        if not inputs.in_place:
            self._cache = dict(zip(self._cache, present, strict=True))
        scores: Array = logits.numpy()
        next_token: Array = scores[np.arange(len(scores)), last if scores.shape[1] > 1 else 0]
        return next_token

    def _new_cache(self, spec: ModelInput, batch: int) -> Any:
        from onnxruntime import OrtValue

        in_place = self._model.inputs.in_place
        empty = np.zeros(spec.cache_shape(batch, self._capacity if in_place else 0) or (), spec.dtype)
        # An empty past holds nothing to move to the device.
        return OrtValue.ortvalue_from_numpy(empty, "cuda" if self._on_cuda and in_place else "cpu", 0)


def _continuation(cache: ModelInput, outputs: Sequence[str], model: str) -> str:
    """The output that holds a cache input and the new tokens, by the names that exporters give."""
    for past, present in (
        ("past_key_values", "present"),
        ("past_key_values", "present_key_values"),
        ("past", "present"),
    ):
        name = cache.name.replace(past, present)
        if name != cache.name and name in outputs:
            return name
    raise ModelError(
        f"{model}, input {cache.name}",
        f"no output continues this cache ({', '.join(outputs)})",
        "Export the model with outputs such as present.0.key for past_key_values.0.key",
    )
