"""Compares an exported graph with the torch model it came from, through the cache as well."""

from __future__ import annotations

__all__ = ["Reference", "compute_reference", "largest_error"]

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from fptq_onnx.export.signatures import Interface

# Rows of the probe: one full, one padded on the left as batched generation does.
_TOKENS, _PADDING, _PREFILL = 9, 3, 5


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A probe and torch's answer to it, kept so that the torch model can be freed before the session is opened.

    Attributes:
        feeds: int64 arrays [2, T] by input name, for the whole probe at once.
        outputs: torch's results as float32, by output name.
        valid: bool [2, T], False on padding, where results mean nothing.
    """

    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    valid: np.ndarray


def compute_reference(model: Any, interface: Interface, is_decoder: bool) -> Reference:
    """Run the probe through the torch model, a decoder always without a cache.

    Args:
        model: The transformers model.
        interface: Inputs to feed and outputs to keep.
        is_decoder: Whether positions count from the first token that is not padding, and padding is on the left.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, _TOKENS), dtype=np.int64)
    mask = np.ones_like(ids)
    padded = slice(0, _PADDING) if is_decoder else slice(_TOKENS - _PADDING, None)
    mask[1, padded] = 0
    candidates = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
        "token_type_ids": np.zeros_like(ids),
    }
    feeds = {name: array for name, array in candidates.items() if name in interface.inputs}
    names = ("logits",) if is_decoder else interface.outputs
    options = {"use_cache": False} if is_decoder else {}
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(array) for name, array in feeds.items()}, **options)
    return Reference(feeds, {name: output[name].float().numpy() for name in names}, mask == 1)


def largest_error(path: Path, reference: Reference, interface: Interface) -> float:
    """Run the probe through the exported model.

    A graph with a cache gets the probe as a prefill of 5 tokens and then token by token, so that its cache has to
    reproduce what torch computes in one go.

    Args:
        path: The exported model.
        reference: torch's results.
        interface: The graph's inputs, outputs and cache sizes.

    Returns:
        The largest absolute difference over all outputs and valid positions, relative to the largest magnitude.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if interface.cache:
        outputs = {"logits": _decode(session, reference, interface)}
    else:
        feeds = {name: reference.feeds[name] for name in interface.inputs}
        outputs = dict(zip(interface.outputs, session.run(interface.outputs, feeds), strict=True))
    worst = 0.0
    for name, expected in reference.outputs.items():
        difference = np.abs(outputs[name].astype(np.float32) - expected)
        if expected.shape[:2] == reference.valid.shape:
            difference = difference[reference.valid]
        error = float(difference.max() / max(float(np.abs(expected).max()), 1e-6))
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return worst


def _decode(session: onnxruntime.InferenceSession, reference: Reference, interface: Interface) -> np.ndarray:
    dtype = np.float16 if "float16" in session.get_inputs()[-1].type else np.float32
    past = [np.zeros((2, heads, 0, size), dtype=dtype) for heads, size in interface.cache for _ in ("key", "value")]
    past_names = [name for name in interface.inputs if name.startswith("past_key_values.")]
    logits = []
    for begin, end in [(0, _PREFILL), *((token, token + 1) for token in range(_PREFILL, _TOKENS))]:
        feeds = {
            name: array[:, :end] if name == "attention_mask" else array[:, begin:end]
            for name, array in reference.feeds.items()
            if name in interface.inputs
        }
        step, *past = session.run(interface.outputs, feeds | dict(zip(past_names, past, strict=True)))
        logits.append(step)
    return np.concatenate(logits, axis=1)
