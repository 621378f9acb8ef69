"""Planted faults are found, named first, and under the right ID."""

from __future__ import annotations

import shlex
from pathlib import Path

import families
import planted
import pytest
from planted import Analyzed

from fptq_onnx.analysis.inspection import clipped_share, outlier_channels
from fptq_onnx.calibration.tokens import encode_text, load_tokenizer, read_text
from fptq_onnx.quantization.statistics import ActivationStatistics

# Without the study of thresholds, which these faults have nothing to do with.
QUICK = ("groups", "layers", "mixed")


def test_a_channel_scaled_by_1000_is_found(outlier: Analyzed) -> None:
    first = outlier.analysis.findings[0]
    assert (first.id, first.kind) == ("AQ-001", "outlier-channel")
    assert first.layers == ["block.1.fc1"]
    assert "Channel 7 " in first.title
    assert first.recovers is not None and first.recovers > 0.5
    assert r"block\.1\.fc1$" in first.action or "activations.v1" in first.action
    assert outlier.analysis.sensitivity[0].name == "block.1.fc1"


def test_calibration_on_another_language_is_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(families.model("gpt2", families.DYNAMO).tokenizer)
    ids = sorted(set(encode_text(tokenizer, read_text(planted.text(tmp_path))).tolist()))
    model = planted.plant(tmp_path, planted.tokens_with_an_outlier(ids, 5))
    analysis = planted.analyzed(model, tmp_path, steps=QUICK, calibration=planted.foreign_text(tmp_path))
    first = analysis.findings[0]
    assert (first.id, first.kind) == ("AQ-001", "calibration-not-representative")
    assert first.recovers is not None and first.recovers > 0.5
    assert any("0% of the evaluation tokens occur" in sentence for sentence in first.evidence)
    assert any("are clipped" in sentence for sentence in first.evidence)
    assert "--calibration" in shlex.split(first.action)


def test_thresholds_that_make_everything_per_token_are_found(tmp_path: Path) -> None:
    model = planted.plant(tmp_path, lambda model: None)
    recipe = planted.recipe(activations__v0=0, activations__v1=0)
    analysis = planted.analyzed(model, tmp_path, recipe=recipe, steps=("thresholds",))
    first = analysis.findings[0]
    assert (first.id, first.kind) == ("AQ-002", "too-many-per-token")
    assert len(first.layers) == 12
    assert "DynamicQuantizePerToken on CPUExecutionProvider" in first.evidence[0]
    assert "activations.v1=" in first.action


def test_heavy_tailed_weights_are_found(tmp_path: Path) -> None:
    """A few rows of a layer are 30 times the others of their groups."""
    model = planted.plant(tmp_path, planted.scaled_channels("block.1.fc1", [3, 35, 67], 1 / 30))
    analysis = planted.analyzed(model, tmp_path, steps=QUICK)
    first = analysis.findings[0]
    assert (first.id, first.kind) == ("AQ-004", "sensitive-weights")
    assert first.layers == ["block.1.fc1"]
    assert analysis.sensitivity[0].weight_snr_db < analysis.sensitivity[0].activation_snr_db - 10
    assert r"block\.1\.fc1$" in shlex.split(first.action)[-1]


def test_equalization_that_cannot_help_is_found(tmp_path: Path) -> None:
    """What one token does to all channels alike, no scale per channel evens out: only scales per token do."""
    tokenizer = load_tokenizer(families.model("gpt2", families.DYNAMO).tokenizer)
    first = encode_text(tokenizer, read_text(planted.text(tmp_path)))[:1].tolist()
    model = planted.plant(tmp_path, planted.loud_tokens("block.1.fc1", first, 5, 30))
    analysis = planted.analyzed(model, tmp_path, recipe=planted.recipe(weights__format="float"), steps=QUICK)
    (finding,) = [each for each in analysis.findings if each.id == "AQ-003"]
    assert (finding.kind, finding.layers) == ("equalization-does-not-help", ["block.1.fc2"])
    assert "per token" in finding.evidence[0]
    assert finding.recovers is not None and finding.recovers > 0.1
    assert "equalization.method=none" in shlex.split(finding.action)


def test_outlier_channels_are_compared_with_the_median() -> None:
    values = [[1.0, -2.0, 100.0, 0.0], [0.5, 1.0, -50.0, 0.0]]
    assert outlier_channels(ActivationStatistics.from_activations(values)) == [
        (2, 50.0),
        (1, 1.0),
        (0, 0.5),
    ]
    assert outlier_channels(ActivationStatistics.from_activations([[0.0, 0.0]])) == []


@pytest.mark.parametrize(("limit", "share"), [(0.5, 0.5), (10.0, 0.0), (3.0, 0.25)])
def test_clipped_values_are_counted(limit: float, share: float) -> None:
    statistics = ActivationStatistics.from_activations([[0.1, 0.2, 2.0, 9.0]])
    assert clipped_share(statistics, limit) == share
