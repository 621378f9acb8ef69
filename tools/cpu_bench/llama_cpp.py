"""llama.cpp on a GGUF file of the same decoder, where the package `xllamacpp` (PyPI, prebuilt wheels) is installed."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpu_bench.timing import clock_for

__all__ = ["PACKAGE", "LlamaCppDecoder", "is_installed"]

PACKAGE = "xllamacpp"


class _Parameters(ctypes.Structure):
    """llama.cpp's parameter structures by value. Longer than any version's: whatever follows is not looked at."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_quiet = _LogFunction(lambda *_: None)


def is_installed() -> bool:
    """Whether `PACKAGE` can be imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def _library() -> Any:
    """llama.cpp's C functions, which the package's extension module exports."""
    import xllamacpp  # noqa: F401

    library = ctypes.CDLL(sys.modules[f"{PACKAGE}.{PACKAGE}"].__file__)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [_LogFunction, pointer]),
        "llama_backend_init": (None, []),
        "llama_print_system_info": (ctypes.c_char_p, []),
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Parameters]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_set_n_threads": (None, [pointer, number, number]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_seq_rm": (ctypes.c_bool, [pointer, number, number, number]),
        "llama_batch_init": (_Batch, [number, number, number]),
        "llama_decode": (number, [pointer, _Batch]),
        "llama_synchronize": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_quiet, None)
    library.llama_backend_init()
    return library


class LlamaCppDecoder:
    """A loaded GGUF file and a context.

    Args:
        path: The file.
        threads: Threads of the computation.
        capacity: Positions of the cache.

    Raises:
        RuntimeError: llama.cpp refuses the file, or its parameters are not laid out as expected.
    """

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        """Load the model and create the context."""
        self._library = library = _library()
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        parameters = library.llama_context_default_params()
        if list(parameters.words[:4]) != [512, 2048, 512, 1]:  # n_ctx, n_batch, n_ubatch, n_seq_max
            raise RuntimeError(f"llama_context_params of this {PACKAGE} is not laid out as expected")
        parameters.words[0] = capacity
        self._context = library.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp cannot create a context of {capacity} positions")
        self._clock = clock_for(threads)
        library.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def features(self) -> str:
        """The instruction sets that this build of llama.cpp uses."""
        return str(self._library.llama_print_system_info().decode()).strip(" |")

    def timer(self, past: int, tokens: int) -> Callable[[], float]:
        """As `GenaiDecoder.timer`."""
        memory = self._library.llama_get_memory(self._context)
        batch = self._batch(past, tokens)
        self._library.llama_memory_seq_rm(memory, 0, 0, -1)
        if past:
            self._run(self._batch(0, past))

        def once() -> float:
            self._library.llama_memory_seq_rm(memory, 0, past, -1)
            start = self._clock()
            self._run(batch)
            return self._clock() - start

        return once

    def _batch(self, past: int, tokens: int) -> _Batch:
        batch: _Batch = self._library.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i, token in enumerate(np.random.default_rng(0).integers(0, self._vocabulary, tokens).tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, past + i, 1, 1
            batch.seq_id[i][0] = 0
        return batch

    def _run(self, batch: _Batch) -> None:
        if self._library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._library.llama_synchronize(self._context)
