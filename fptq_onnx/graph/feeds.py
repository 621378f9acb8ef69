"""The inputs of a transformer: what it declares, and complete feeds made from token ids alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.errors import CalibrationError
from fptq_onnx.graph.lookups import TOKEN_NAMES, attends_in_place, cache_head_size, position_limit, vocabulary_size

__all__ = ["Feeds", "ModelInput", "ModelInputs", "describe_inputs", "describe_session"]

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

_MASK_NAMES = ("attention_mask", "input_mask")
_POSITION_NAMES = ("position_ids", "cache_position")
_SEGMENT_NAMES = ("token_type_ids", "segment_ids")
# Scalars of optimum's exports: all logits, and the branch of a merged decoder that has no past.
_CONSTANTS = {"num_logits_to_keep": 0, "logits_to_keep": 0, "use_cache_branch": False}


@dataclass(frozen=True)
class ModelInput:
    """One declared input.

    Attributes:
        name: Name in the graph.
        dtype: Element type; None where numpy has none.
        shape: An int for a fixed dimension, else its symbol or None; None as a whole where the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None if unknown."""
        return None if self.shape is None else len(self.shape)

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...] | None:
        """Shape of a key or value cache of `length` tokens, in whichever order the model declares its axes.

        Args:
            batch: Number of sequences.
            length: Tokens in the cache.

        Returns:
            For example [batch, heads, length, head size]; None if this input is no cache.
        """
        if self.shape is None or len(self.shape) != 4 or not any(part in self.name for part in ("past", "cache")):
            return None
        if sum(not isinstance(size, int) for size in self.shape[1:]) != 1:
            return None
        return (batch, *(size if isinstance(size, int) else length for size in self.shape[1:]))

    def check(self, array: Array, where: str) -> None:
        """Raise CalibrationError unless `array` has the declared type and shape."""
        if not isinstance(array, np.ndarray):
            raise CalibrationError(
                f"{where}, input {self.name}", f"is a {type(array).__name__}, not a numpy array", "Pass numpy arrays"
            )
        if self.dtype is not None and array.dtype != self.dtype:
            raise CalibrationError(
                f"{where}, input {self.name}",
                f"has type {array.dtype} where the model takes {self.dtype}",
                f"Convert it with .astype('{self.dtype}')",
            )
        if self.shape is None:
            return
        if array.ndim != len(self.shape) or any(
            isinstance(fixed, int) and fixed != size for fixed, size in zip(self.shape, array.shape, strict=True)
        ):
            declared = ", ".join("?" if size is None else str(size) for size in self.shape)
            raise CalibrationError(
                f"{where}, input {self.name}",
                f"has shape {list(array.shape)} where the model takes [{declared}]",
                "Feed arrays of the declared shape",
            )


@dataclass(frozen=True)
class ModelInputs:
    """All inputs that a model needs, and the knowledge to fill them from token ids.

    Attributes:
        inputs: The declared inputs, those with a default (initializer) left out.
        vocabulary: Number of token ids that the embedding knows; None if it was not found.
        positions: Longest sequence that the position tables allow; None if none was found.
        in_place: Attention (GroupQueryAttention) can append to a cache in the buffer that it is read from. Such
            models take padding on the right, after the tokens; others on the left.
    """

    inputs: tuple[ModelInput, ...]
    vocabulary: int | None = None
    positions: int | None = None
    in_place: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs in the model's order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def token_input(self) -> ModelInput | None:
        """The input of token ids [B, S]; None for a model that takes none (pixels, embeddings)."""
        for name in TOKEN_NAMES:
            for spec in self.inputs:
                if spec.name == name:
                    return spec
        return None

    @property
    def mask_input(self) -> ModelInput | None:
        """The input that tells tokens from padding; None if there is none."""
        return next((spec for spec in self.inputs if spec.name in _MASK_NAMES), None)

    @property
    def caches(self) -> tuple[ModelInput, ...]:
        """The inputs that hold keys and values of earlier tokens."""
        return tuple(spec for spec in self.inputs if spec.cache_shape(1, 0) is not None)

    @property
    def batch_size(self) -> int | None:
        """Fixed batch dimension of the token ids, None if dynamic."""
        return self._fixed(0)

    def window(self, length: int) -> int:
        """Sequence length to use where `length` is wished for: the fixed one, or at most what positions allow."""
        return self.sequence_length or min(length, self.positions or length)

    @property
    def sequence_length(self) -> int | None:
        """Fixed sequence dimension of the token ids, None if dynamic."""
        return self._fixed(1)

    def feeds(
        self, token_ids: npt.NDArray[np.integer[Any]], attention_mask: Array | None = None, where: str = "token ids"
    ) -> Feeds:
        """Complete feeds for a batch of sequences without a past.

        Fills the attention mask (ones), positions (counted over the mask), token types (zeros), an empty key/value
        cache, and the switches that some exporters add.

        Args:
            token_ids: Integers [B, S].
            attention_mask: 1 for tokens, 0 for padding, [B, S]; all ones if absent.
            where: How to name the data in an error.

        Raises:
            CalibrationError: An input cannot be filled, ids lie outside the vocabulary, or a fixed dimension differs.
        """
        tokens = self.token_input
        if tokens is None:
            raise CalibrationError(
                f"inputs {', '.join(self.names)}", "none of them takes token ids", "Feed all inputs from an .npz file"
            )
        feeds: Feeds = {tokens.name: _as_type(np.asarray(token_ids), tokens)}
        if attention_mask is not None:
            mask = self.mask_input
            if mask is not None:
                feeds[mask.name] = _as_type(np.asarray(attention_mask), mask)
            elif not np.all(attention_mask):
                raise CalibrationError(
                    where, "is padded, but the model takes no attention mask", "Feed sequences of one length"
                )
        return self.complete(feeds, where)

    def complete(self, feeds: Mapping[str, Array], where: str) -> Feeds:
        """Check feeds against the declared inputs and fill those that follow from the token ids.

        Args:
            feeds: Arrays by input name.
            where: How to name the data in an error, such as "batch 3 of feeds.npz".

        Raises:
            CalibrationError: An input is unknown, missing and not fillable, of another type or shape, or token ids
                lie outside the vocabulary.
        """
        if not isinstance(feeds, Mapping):
            raise CalibrationError(where, f"is a {type(feeds).__name__}", "Give feeds: arrays by input name")
        unknown = sorted(set(feeds) - set(self.names))
        if unknown:
            raise CalibrationError(
                where, f"holds {', '.join(unknown)}, which the model does not take", f"Use {', '.join(self.names)}"
            )
        for spec in self.inputs:
            if spec.name in feeds:
                spec.check(feeds[spec.name], where)
        token_ids = feeds.get(self.token_input.name) if self.token_input else None
        if token_ids is not None:
            self._check_vocabulary(token_ids, where)
        mask = next((feeds[name] for name in _MASK_NAMES if name in feeds), None)
        complete: Feeds = {}
        for spec in self.inputs:
            array = feeds.get(spec.name)
            if array is None:
                array = None if token_ids is None else _fill(spec, token_ids, mask)
                if array is None:
                    raise CalibrationError(
                        f"{where}, input {spec.name}",
                        "is missing and does not follow from token ids",
                        "Feed it from an .npz file or a CalibrationDataReader",
                    )
                spec.check(array, where)
            complete[spec.name] = array
        return complete

    def token_positions(self, feeds: Mapping[str, Array]) -> npt.NDArray[np.int64] | None:
        """Position of each token in its sequence, counted over the attention mask and so over a past.

        Args:
            feeds: Complete feeds.

        Returns:
            int64 [B, S], -1 for padding; None if the model takes no sequences of tokens or embeddings.
        """
        grid = next((feeds[name].shape for name in TOKEN_NAMES if name in feeds), None)
        if grid is None and "inputs_embeds" in feeds:
            grid = feeds["inputs_embeds"].shape[:2]
        if grid is None or len(grid) != 2:
            return None
        batch, sequence = grid
        mask = next((feeds[name] for name in _MASK_NAMES if name in feeds), None)
        if mask is None or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < sequence:
            return np.broadcast_to(np.arange(sequence, dtype=np.int64), grid)
        real = mask != 0
        positions = np.where(real, np.cumsum(real, axis=1, dtype=np.int64) - 1, -1)
        # A mask longer than the tokens also covers the past, which comes first.
        return positions[:, mask.shape[1] - sequence :]

    def _fixed(self, axis: int) -> int | None:
        tokens = self.token_input
        if tokens is None or tokens.shape is None or len(tokens.shape) != 2:
            return None
        size = tokens.shape[axis]
        return size if isinstance(size, int) else None

    def _check_vocabulary(self, token_ids: Array, where: str) -> None:
        if token_ids.size == 0:
            raise CalibrationError(where, f"holds no token (shape {list(token_ids.shape)})", "Feed at least one token")
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            bound = "" if self.vocabulary is None else f" 0..{self.vocabulary - 1}"
            raise CalibrationError(
                where,
                f"holds token id {low if low < 0 else high}, outside the model's vocabulary{bound}",
                "Use the tokenizer that belongs to the model",
            )


def describe_inputs(model: ir.Model) -> ModelInputs:
    """Read the declared inputs of a model, its vocabulary and the longest sequence it takes."""
    inputs = []
    for value in model.graph.inputs:
        if value.name is None or value.name in model.graph.initializers:
            continue
        shape = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        if shape is not None and len(shape) == 4 and not isinstance(shape[3], int):
            shape = (*shape[:3], cache_head_size(value) or shape[3])
        inputs.append(ModelInput(value.name, _numpy_type(value.dtype), shape))
    described = ModelInputs(tuple(inputs))
    tokens = described.token_input
    if tokens is None:
        return described
    token_ids = next(value for value in model.graph.inputs if value.name == tokens.name)
    return ModelInputs(
        described.inputs,
        vocabulary_size(model.graph, token_ids),
        position_limit(model.graph, token_ids),
        attends_in_place(model.graph, {spec.name for spec in described.caches}),
    )


class _NodeArg(Protocol):
    name: str
    type: str
    shape: Sequence[int | str | None]


class _Session(Protocol):
    def get_inputs(self) -> Sequence[_NodeArg]: ...


def describe_session(session: _Session) -> ModelInputs:
    """Read the declared inputs of an onnxruntime session; the vocabulary stays unknown."""
    types = {"float": "float32", "double": "float64"}
    inputs = []
    for arg in session.get_inputs():
        element = arg.type.removeprefix("tensor(").removesuffix(")")
        try:
            dtype = np.dtype(types.get(element, element))
        except TypeError:
            dtype = None
        inputs.append(ModelInput(arg.name, dtype, tuple(arg.shape)))
    return ModelInputs(tuple(inputs))


def _numpy_type(dtype: ir.DataType | None) -> np.dtype[Any] | None:
    try:
        return None if dtype is None else np.dtype(dtype.numpy())
    except TypeError:
        return None


def _as_type(array: Array, spec: ModelInput) -> Array:
    return array if spec.dtype is None else array.astype(spec.dtype)


def _fill(spec: ModelInput, token_ids: Array, mask: Array | None) -> Array | None:
    """Value of an input that follows from token ids [B, S] and their mask; None where nothing is known."""
    batch, sequence = token_ids.shape
    if spec.dtype is None:
        return None
    if spec.name in _MASK_NAMES and spec.rank in (2, None):
        return np.ones((batch, sequence), spec.dtype)
    if spec.name in _POSITION_NAMES:
        # A mask longer than the tokens also covers the past, which comes first.
        total = mask.shape[1] if mask is not None and mask.ndim == 2 else sequence
        if spec.rank == 1:
            return np.arange(total - sequence, total).astype(spec.dtype)
        counted = np.ones((batch, sequence), np.int64) if mask is None else (mask != 0).astype(np.int64)
        if counted.shape == (batch, total) and total >= sequence:
            positions: Array = np.maximum(np.cumsum(counted, axis=1) - 1, 0)[:, total - sequence :].astype(spec.dtype)
            return positions
    if spec.name in _SEGMENT_NAMES:
        return np.zeros((batch, sequence), spec.dtype)
    if spec.name in _CONSTANTS:
        return np.full([d if isinstance(d, int) else 1 for d in spec.shape or ()], _CONSTANTS[spec.name], spec.dtype)
    empty = spec.cache_shape(batch, 0)
    return None if empty is None else np.zeros(empty, spec.dtype)
