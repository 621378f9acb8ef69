"""Greedy generation: the loop, where it stops, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
from greedy import greedy
from typer.testing import CliRunner

from fptq_onnx.calibration.tokens import load_tokenizer
from fptq_onnx.cli import app
from fptq_onnx.errors import CalibrationError, ModelError
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.generate import find_model, generate, stop_tokens

NEW = 8


@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32, families.GENAI_FP16])
def test_prompts_of_different_lengths_run_as_one_batch(family: str) -> None:
    model = open_language_model(families.model("llama", family).path, threads=1)
    prompts = [[5, 6, 7, 8], [200], [31, 14, 15]]
    made = generate(model, prompts, max_new_tokens=NEW)
    assert made.token_ids == [greedy(model, prompt, NEW) for prompt in prompts]
    assert (made.prefill_tokens, made.decode_steps) == (8, NEW - 1)


def test_each_sequence_ends_with_its_stop_token() -> None:
    model = open_language_model(families.model("llama", families.DYNAMO_KV).path, threads=1)
    prompts = [[5, 6, 7, 8], [200]]
    whole = [greedy(model, prompt, NEW) for prompt in prompts]
    stop = whole[1][2]
    made = generate(model, prompts, max_new_tokens=NEW, stop={stop})
    ends = [row.index(stop) + 1 if stop in row else NEW for row in whole]
    assert made.token_ids == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert made.decode_steps == max(ends) - 1


def test_no_token_is_asked_for() -> None:
    model = open_language_model(families.model("llama", families.DYNAMO_KV).path, threads=1)
    with pytest.raises(CalibrationError, match="at least one token"):
        generate(model, [[1]], max_new_tokens=0)
    with pytest.raises(CalibrationError, match="at least one token per prompt"):
        generate(model, [], max_new_tokens=1)


def test_where_the_model_lies(tmp_path: Path) -> None:
    genai = families.model("llama", families.GENAI_FP32).path
    assert find_model(genai.parent) == genai == find_model(genai)
    plain = families.model("llama", families.DYNAMO_KV).path
    assert find_model(plain.parent) == plain
    with pytest.raises(ModelError, match="holds neither genai_config"):
        find_model(tmp_path)


def test_what_ends_a_text(tmp_path: Path) -> None:
    assert stop_tokens(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert stop_tokens(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert stop_tokens(tmp_path) == {2, 3}
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "a.onnx"}, "eos_token_id": 7}}')
    assert stop_tokens(tmp_path) == {7}
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        stop_tokens(tmp_path)


def test_command() -> None:
    tiny = families.model("llama", families.GENAI_FP32)
    arguments = ["generate", str(tiny.path.parent), "--max-new-tokens", str(NEW), "--ignore-stop", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--prompt", "The old mill", "--prompt", "She"])
    assert result.exit_code == 0, result.output
    sequences = json.loads(result.stdout)["sequences"]
    by_ids = [",".join(map(str, sequence["prompt_ids"])) for sequence in sequences]
    again = CliRunner().invoke(app, [*arguments, "--prompt-ids", by_ids[0], "--prompt-ids", by_ids[1]])
    assert json.loads(again.stdout)["sequences"] == sequences
    assert [len(sequence["token_ids"]) for sequence in sequences] == [NEW, NEW]


def test_command_prints_prompt_and_continuation() -> None:
    """The text on stdout, the speed on stderr; a prompt of ids is answered by text where there is a tokenizer."""
    tiny = families.model("llama", families.DYNAMO_KV)
    arguments = ["generate", str(tiny.path), "--max-new-tokens", "4", "--ignore-stop", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--prompt", "The [bold]mill"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The [bold]mill") and len(result.stdout) > len("The [bold]mill")
    assert "prefill" in result.stderr and "decode" in result.stderr and "tokens/s" in result.stderr
    ids = load_tokenizer(tiny.tokenizer).encode("The [bold]mill").ids
    by_ids = CliRunner().invoke(app, [*arguments, "--prompt-ids", ",".join(map(str, ids))])
    assert f"The [bold]mill{by_ids.stdout}" == result.stdout


def test_command_needs_a_tokenizer_for_text(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "--prompt", "a"])
    assert result.exit_code == 1 and "there is no tokenizer.json beside it" in result.stderr


@pytest.mark.parametrize("options", [("generate", "--prompt", "a"), ("evaluate", "--text", "text.txt")])
def test_command_names_a_missing_model(options: tuple[str, ...], tmp_path: Path) -> None:
    command, *rest = options
    result = CliRunner().invoke(app, [command, str(tmp_path / "missing.onnx"), *rest])
    assert result.exit_code == 1 and "missing.onnx: there is no such file" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("prompts", [[], ["--prompt", "a", "--prompt-ids", "1"], ["--prompt-ids", "one"]])
def test_command_with_wrong_prompts(prompts: list[str]) -> None:
    result = CliRunner().invoke(app, ["generate", "model.onnx", *prompts])
    assert result.exit_code == 2 and "prompt" in result.stderr
