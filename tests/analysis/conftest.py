"""What the tests of the analysis share: their helpers' folder on the path, and one complete analysis."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import planted


@pytest.fixture(scope="session")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> planted.Analyzed:
    """A model with one input channel scaled by 1000, analyzed once for all tests, which leave it as it is."""
    folder = tmp_path_factory.mktemp("outlier")
    model = planted.plant(folder, planted.scaled_channels("block.1.fc1", [7], 1000))
    analysis = planted.analyzed(model, folder, work_dir=folder / "work", target=0.5)
    return planted.Analyzed(model, folder, folder / "report", folder / "work", analysis)
