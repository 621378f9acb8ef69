"""Small models from ONNX text for the passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fptq_onnx.graph.model_file import load_model

K, N = 24, 10


def weight(k: int = K, n: int = N, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """A random weight [k, n]."""
    return np.random.default_rng(seed).standard_normal((k, n)).astype(dtype)


def tokens(k: int = K, seed: int = 1, dtype: str = "float32") -> np.ndarray:
    """A random activation [2, 3, k]."""
    return np.random.default_rng(seed).standard_normal((2, 3, k)).astype(dtype)


def parse(tmp_path: Path, signature: str, body: str, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """Read a model as convert does."""
    text = f'<ir_version: 10, opset_import: ["" : 21]>\nmain {signature} {{\n{body}\n}}'
    path = tmp_path / "parsed.onnx"
    ir.save(ir.from_onnx_text(text, initializers=[ir.tensor(a, name=n) for n, a in weights.items()]), path)
    return load_model(path)
