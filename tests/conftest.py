"""Fixtures shared by all tests: the tiny models in every graph family, and a real one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import families
import real_model
from hypothesis import settings

# HYPOTHESIS_PROFILE=ci, as continuous integration sets it: the same examples whenever the same tests run, so that a run
# fails for the change that it is of. Without it examples are new each time, which is how rare cases come up.
settings.register_profile("ci", derandomize=True, print_blob=True)
if profile := os.environ.get("HYPOTHESIS_PROFILE"):
    settings.load_profile(profile)


def _identifier(parameter: object) -> str:
    return "-".join(parameter) if isinstance(parameter, tuple) else str(parameter)


@pytest.fixture(params=families.LLAMA_FAMILIES)
def tiny_llama(request: pytest.FixtureRequest) -> families.TinyModel:
    """The same tiny Llama (GQA, tied lm_head) in each of its four graph families."""
    return families.model("llama", request.param)


@pytest.fixture(params=families.ALL_MODELS, ids=_identifier)
def tiny_model(request: pytest.FixtureRequest) -> families.TinyModel:
    """Every tiny model in every family."""
    return families.model(*request.param)


@pytest.fixture
def smollm2() -> Callable[[str], Path]:
    """SmolLM2-135M in a graph family, by name: `smollm2("dynamo-kv")` is the path of model.onnx. For slow tests."""
    return real_model.smollm2
