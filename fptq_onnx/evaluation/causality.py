"""Whether a model predicts each token from those before it: what perplexity and last-word accuracy rest on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fptq_onnx.errors import CalibrationError

__all__ = ["PROBE_TOKENS", "check_causal", "mixes_tokens"]

PROBE_TOKENS = 8
"""Length of the sequence that `check_causal` is best run with: a token's influence fades with the distance."""

# Of the change at the changed token itself. Causal models give 0, a tiny random BERT 0.2 to 0.6.
_TOLERANCE = 1e-3


def check_causal(
    run: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]], token_ids: npt.NDArray[np.int64], name: str
) -> None:
    """Refuse a model that sees the tokens it is to predict, such as a masked language model.

    The last token is changed; in a causal model that leaves the logits of all earlier ones as they were.

    Args:
        run: Logits [S, vocabulary] of one sequence [S].
        token_ids: A sequence of two tokens or more.
        name: How to name the model.

    Raises:
        CalibrationError: Earlier logits change.
    """
    changed = token_ids.copy()
    changed[-1] = 0 if token_ids[-1] else 1
    difference = run(changed).astype(np.float64) - run(token_ids).astype(np.float64)
    size = np.linalg.norm(difference, axis=-1)
    if size[:-1].max() > _TOLERANCE * size[-1]:
        raise CalibrationError(
            name,
            "its logits at a token depend on the tokens behind it (a masked language model or another encoder), so that"
            " perplexity and last-word accuracy say nothing about it",
            "Take the mean KL and top-1 agreement that convert reports, or analyze with --metric kl (--metric cosine "
            "where embeddings are what counts)",
        )


def mixes_tokens(model: ir.Model) -> bool:
    """Whether one dynamic scale quantizes several tokens: each then moves the others a little, causal or not."""
    return any(node.op_type in ("DynamicQuantizeLinear", "DynamicQuantizeMatMul") for node in model.graph.all_nodes())
