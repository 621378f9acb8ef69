"""Quantized weights of finished blocks: in memory, or in a work directory from which they are read when saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.int8 import Int8Weight
from fptq_onnx.quantization.packing import pack_int4, unpack_int4
from fptq_onnx.storage.work_dir import WorkDir

__all__ = ["StoredWeights"]

Array = npt.NDArray[Any]


class StoredWeights:
    """Weights by layer name, stored a block at a time.

    Args:
        work: Where to keep them; None keeps them in memory.
    """

    def __init__(self, work: WorkDir | None) -> None:
        """Nothing is stored yet; what an earlier process stored is found by `restore`."""
        self._work = work
        self._held: dict[str, QuantizedWeight | Int8Weight] = {}
        self._places: dict[str, tuple[str, dict[str, Any]]] = {}

    def restore(self, record: str) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """Find a block that an earlier process finished: its further arrays and notes, None if it did not."""
        if self._work is None or not self._work.has(record):
            return None
        arrays, notes = self._work.load(record, "also.")
        self._index(record, notes["weights"])
        return arrays, notes["also"]

    def put(
        self,
        record: str,
        weights: Mapping[str, QuantizedWeight | Int8Weight],
        arrays: Mapping[str, Array],
        notes: Mapping[str, Any],
    ) -> None:
        """Store the weights of a block, and with them what else came out of it.

        Args:
            record: Name of the block's record.
            weights: By layer name.
            arrays: Further arrays, whose names begin with "also.".
            notes: Anything JSON holds.
        """
        if self._work is None:
            self._held |= weights
            return
        stored: dict[str, Array] = dict(arrays)
        described = {}
        for number, (name, weight) in enumerate(weights.items()):
            stored[f"scale.{number}"] = weight.scale
            if isinstance(weight, Int8Weight):
                stored[f"q.{number}"] = weight.q
                described[name] = {"number": number, "shape": list(weight.q.shape), "block_size": 0}
                continue
            stored[f"q.{number}"] = pack_int4(weight.q)
            described[name] = {
                "number": number,
                "shape": list(weight.q.shape),
                "block_size": weight.block_size,
                "scale_max_multiple": weight.scale_max_multiple,
            }
        self._work.save(record, stored, {"weights": described, "also": dict(notes)})
        self._index(record, described)

    def get(self, name: str) -> QuantizedWeight | Int8Weight:
        """The weight of a layer, read from disk each time if it lies there."""
        if name in self._held:
            return self._held[name]
        record, about = self._places[name]
        assert self._work is not None
        packed = self._work.read(record, f"q.{about['number']}")
        scale = self._work.read(record, f"scale.{about['number']}")
        if not about["block_size"]:
            return Int8Weight(packed, scale)
        rows, columns = about["shape"]
        return QuantizedWeight(
            unpack_int4(packed, (rows, columns)), scale, about["block_size"], about["scale_max_multiple"]
        )

    def _index(self, record: str, described: Mapping[str, dict[str, Any]]) -> None:
        self._places |= {name: (record, about) for name, about in described.items()}
