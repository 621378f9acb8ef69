"""A causal language model behind an onnxruntime session: token ids in, logits and seconds out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.errors import CalibrationError
from fptq_onnx.evaluation.causality import PROBE_TOKENS, check_causal, mixes_tokens
from fptq_onnx.graph.feeds import ModelInputs, describe_inputs, describe_session
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.runtime import Provider, session

__all__ = ["LanguageModel", "open_language_model"]

_DOMAIN = "fptq"


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A session and what it takes to run it.

    Attributes:
        session: onnxruntime session of a causal language model.
        inputs: Its inputs.
        name: How to name it in errors.
        logits: Name of the output of logits [B, S, vocabulary].
        causal: Known to be causal, or not to be told from one (see `mixes_tokens`).
    """

    session: Any
    inputs: ModelInputs
    name: str
    logits: str
    causal: bool = False

    @classmethod
    def from_session(cls, session: Any, inputs: ModelInputs | None = None, name: str = "the model") -> LanguageModel:
        """Wrap a session.

        Args:
            session: onnxruntime session.
            inputs: From `describe_inputs`; read from the session if None, which knows neither the vocabulary nor the
                head size of a cache that declares it by a symbol.
            name: How to name the model in errors.

        Raises:
            CalibrationError: The model has no output of logits.
        """
        outputs = {output.name: len(output.shape or ()) for output in session.get_outputs()}
        sequences = [output for output, rank in outputs.items() if rank == 3]
        if "logits" in outputs:
            logits = "logits"
        elif len(sequences) == 1:
            logits = sequences[0]
        else:
            raise CalibrationError(
                name, f"has no output of logits among {', '.join(outputs)}", "Evaluate a causal language model"
            )
        return cls(session, inputs or describe_session(session), name, logits)

    def check_causal(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Refuse a model that sees the tokens it is to predict; a key/value cache is proof enough that it does not.

        Args:
            token_ids: The start of a text, int64 [2 or more].

        Raises:
            CalibrationError: It does, or it fails.
        """
        if not self.causal and not self.inputs.caches:
            ids = token_ids[: self.inputs.window(PROBE_TOKENS)]
            check_causal(lambda ids: self.run(ids, "window 0")[0], ids, self.name)

    def run(self, token_ids: npt.NDArray[np.int64], where: str) -> tuple[npt.NDArray[Any], float]:
        """Logits [S, vocabulary] of one sequence [S] in the model's type, and the seconds that running it took.

        Raises:
            CalibrationError: The ids do not fit the model or it fails.
        """
        feeds = self.inputs.feeds(token_ids[None], where=where)
        start = time.perf_counter()
        try:
            (logits,) = self.session.run([self.logits], feeds)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise CalibrationError(
                f"{self.name}, {where}", f"cannot be run: {error}", "Use a window that the model accepts"
            ) from error
        seconds = time.perf_counter() - start
        if logits.shape[:2] != (1, token_ids.size):
            raise CalibrationError(
                self.name,
                f"gives logits {list(logits.shape)} for {token_ids.size} tokens",
                "Export the model with the logits of all positions",
            )
        return logits[0], seconds


def open_language_model(
    path: str | os.PathLike[str],
    provider: Provider = "cpu",
    *,
    register_library: bool | None = None,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
) -> LanguageModel:
    """Open a model file.

    Args:
        path: ONNX file of a causal language model.
        provider: "cpu" or "cuda".
        register_library: Register the op library; by default for models that use its ops.
        threads: Intra-op threads, onnxruntime's choice if None.
        config: Session configuration entries.

    Raises:
        ModelError: The file is broken or missing.
        CalibrationError: It is not a causal language model.
        RuntimeUnavailableError: The runtime, provider or library is missing.
    """
    model = load_model(path)
    if register_library is None:
        register_library = _DOMAIN in model.graph.opset_imports
    opened = session(path, provider, register_library=register_library, threads=threads, config=config or {})
    found = LanguageModel.from_session(opened, describe_inputs(model), os.fspath(path))
    return dataclasses.replace(found, causal=mixes_tokens(model))
