"""What a file of onnxruntime-genai's builder says about its decoder."""

from __future__ import annotations

from pathlib import Path

import onnx

__all__ = ["head_size"]


def head_size(path: Path) -> int:
    """Channels of an attention head: twice the width of the builder's table of rotary cosines."""
    tensors = {tensor.name: tensor.dims for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    return 2 * int(tensors["cos_cache"][1])
