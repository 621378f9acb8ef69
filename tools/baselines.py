"""What onnxruntime's own tools make of the same float model: the figures to compare with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from fptq_onnx.graph.feeds import ModelInputs, describe_inputs
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.progress import Advance

__all__ = ["model_bytes", "quantize_matmulnbits", "quantize_static_int8"]

Array = npt.NDArray[Any]


def quantize_matmulnbits(source: Path, target: Path, block_size: int = 128) -> None:
    """Int4 weights with zero points in blocks along K; int8 activations inside the kernel (accuracy level 4)."""
    _make_room(target)
    with _quiet():
        quantizer = MatMulNBitsQuantizer(str(source), block_size=block_size, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def quantize_static_int8(source: Path, target: Path, token_ids: npt.NDArray[np.int64], advance: Advance) -> None:
    """Int8 weights and uint8 activations of every MatMul and Gemm, one scale per tensor, as QuantizeLinear pairs.

    All else is at its default, with two departures that help it. With every operator quantized the perplexity of
    SmolLM2's export with a cache was 132,362 (attention masks hold -3e38, which may be why); limited to matrix products
    it is 181. And int8 activations before a Reshape make files that onnxruntime 1.27 to 1.32 refuse to load.

    Args:
        source: The float model.
        target: Where to write.
        token_ids: Calibration windows, int64 [windows, length].
        advance: Told of each window.
    """
    _make_room(target)
    reader = _Reader(describe_inputs(load_model(source)), token_ids, advance)
    with _quiet():
        quantize_static(
            str(source),
            str(target),
            reader,
            op_types_to_quantize=["MatMul", "Gemm"],
            activation_type=QuantType.QUInt8,
            use_external_data_format=True,
        )


def model_bytes(path: Path) -> int:
    """Size of a model file and its external data."""
    model = onnx.load(path, load_external_data=False)
    names = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds windows of token ids, with a cache of one masked token.

    quantize_static observes every tensor through ReduceMin and ReduceMax, which onnxruntime refuses for the zero
    elements of an empty cache.
    """

    def __init__(self, inputs: ModelInputs, token_ids: npt.NDArray[np.int64], advance: Advance) -> None:
        self._windows: Iterator[npt.NDArray[np.int64]] = iter(token_ids)
        self._inputs = inputs
        self._advance = advance

    def get_next(self) -> dict[str, Array] | None:
        ids = next(self._windows, None)
        if ids is None:
            return None
        self._advance(1)
        feeds = dict(self._inputs.feeds(ids[None]))
        caches = [name for name, array in feeds.items() if array.ndim == 4 and array.shape[2] == 0]
        for name in caches:
            batch, heads, _, size = feeds[name].shape
            feeds[name] = np.zeros((batch, heads, 1, size), feeds[name].dtype)
        if caches:
            feeds["attention_mask"] = np.pad(feeds["attention_mask"], ((0, 0), (1, 0)))
        return feeds


def _make_room(target: Path) -> None:
    """Remove what an earlier run left: onnx would append to its external data."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in target.parent.glob(f"{target.name}*"):
        file.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """These tools log each node they see through the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
