"""OpenVINO on the same float decoder, where its package (PyPI `openvino`; `nncf` for int4 weights) is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpu_bench.decoder_file import head_size
from cpu_bench.timing import clock_for

__all__ = ["OPENVINO", "OpenVinoDecoder", "missing_package"]

# Name -> precision of the computation, and whether the weights become int4 (groups of 128, symmetric).
OPENVINO = {
    "OpenVINO f32": ("f32", False),
    "OpenVINO bf16": ("bf16", False),
    "OpenVINO bf16, int4 weights": ("bf16", True),
}


def missing_package(name: str) -> str | None:
    """Return the package that a name in `OPENVINO` needs and this environment lacks."""
    needed = ["openvino", "nncf"] if OPENVINO[name][1] else ["openvino"]
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def _int4_weights(model: Any) -> Any:
    """int4 weights in groups of 64. nncf refuses the untyped constants that stand for absent inputs of attention."""
    import nncf
    from openvino import opset13

    absent = [(port, port.get_source_output()) for node in model.get_ops() for port in node.inputs()]
    absent = [(port, source) for port, source in absent if source.get_element_type().is_dynamic()]
    for port, _ in absent:
        port.replace_source_output(opset13.constant(np.zeros(0, np.float32)).output(0))
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0)
    for port, source in absent:
        port.replace_source_output(source)
    return model


class OpenVinoDecoder:
    """A compiled decoder with explicit cache inputs; each run makes its present outputs anew."""

    def __init__(self, name: str, path: Path, threads: int) -> None:
        """Read, compress if asked to, and compile."""
        import openvino

        precision, int4 = OPENVINO[name]
        core = openvino.Core()
        model = core.read_model(path)
        if int4:
            model = _int4_weights(model)
        self._clock = clock_for(threads)
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        self._request = core.compile_model(model, "CPU", options).create_infer_request()
        self._inputs = {value.get_any_name(): value.get_partial_shape() for value in model.inputs}
        self._heads = next(int(shape[1].get_length()) for name, shape in self._inputs.items() if name.endswith(".key"))
        self._size = head_size(path)

    def timer(self, past: int, tokens: int) -> Callable[[], float]:
        """As `GenaiDecoder.timer`."""
        feeds: dict[str, Any] = {}
        for name in self._inputs:
            if name == "input_ids":
                feeds[name] = np.random.default_rng(0).integers(0, 300, (1, tokens))
            elif name == "attention_mask":
                feeds[name] = np.ones((1, past + tokens), np.int64)
            elif name == "position_ids":
                feeds[name] = np.arange(past, past + tokens)[None]
            else:
                feeds[name] = np.zeros((1, self._heads, past, self._size), np.float32)

        def once() -> float:
            start = self._clock()
            self._request.infer(feeds, share_inputs=True, share_outputs=True)
            return self._clock() - start

        return once
