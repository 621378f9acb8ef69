"""The demo's steps on a tiny model: everything but the size is real."""

from __future__ import annotations

import io
import json
from pathlib import Path

import families
import pytest
from rich.console import Console

from tools import assets, demo


def test_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old mill stood by the river, and nobody had opened its doors for thirty years. " * 30)
    monkeypatch.setattr(assets, "smollm2", lambda progress: families.checkpoint("llama"))
    monkeypatch.setattr(assets, "brown_text", lambda progress: assets.BrownText(text, text))
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "PERPLEXITY_TOKENS", 4 * 31)
    monkeypatch.setattr(demo, "DIVERGENCE_TOKENS", 2 * 31)
    console = Console(file=io.StringIO(), width=200)
    output = tmp_path / "demo"
    demo.run(output, fresh=False, console=console)

    results = json.loads((output / "results.json").read_text())
    floats, *quantized = results["rows"]
    assert floats["model"] == "float32" and floats["kl_mean"] is None
    assert len(quantized) == 4
    for row in quantized:
        assert row["kl_mean"] > 0 and 0 < row["top1_agreement"] <= 1
        assert row["tokens_per_second"] > 0 and row["megabytes"] < floats["megabytes"]
        assert row["model"] in console.file.getvalue()

    demo.run(output, fresh=False, console=console)
    assert "Reusing the export" in console.file.getvalue()
