"""The example programs print the tokens that Python generates, with the op library and without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import families
import pytest
import real_conversions
from conversions import converted
from programs import CPP, CSHARP, REPOSITORY, run, tokens

from fptq_onnx.calibration.tokens import encode_text, load_tokenizer
from fptq_onnx.evaluation.language_model import open_language_model
from fptq_onnx.generation.generate import generate

PROGRAMS = (CPP, CSHARP)
PROMPT = (5, 6, 7, 8)
NEW = 10
TEXT = "Once upon a time, in a village by the sea,"


def _python(model: Path, prompt: tuple[int, ...], new: int, *, library: bool) -> list[int]:
    opened = open_language_model(model, register_library=library, threads=1)
    return generate(opened, [prompt], max_new_tokens=new).token_ids[0]


def _options(in_place: bool, head_size: int, library: bool) -> list[object]:
    own: list[object] = ["--threads", 1] if library else ["--threads", 1, "--no-library"]
    return [*own, "--in-place", "--head-size", head_size] if in_place else own


@pytest.mark.parametrize("library", [True, False], ids=["kernels", "functions"])
@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32, families.GENAI_FP16])
@pytest.mark.parametrize("program", PROGRAMS)
def test_tiny_model(program: str, family: str, library: bool) -> None:
    model = converted("llama", family).path
    options = _options(family != families.DYNAMO_KV, families.HEAD_SIZE, library)
    printed = tokens(program, model, PROMPT, "--tokens", NEW, *options)
    assert printed == _python(model, PROMPT, NEW, library=library)


@pytest.mark.parametrize("program", PROGRAMS)
def test_cache_in_place_and_not_give_the_same(program: str) -> None:
    model = converted("llama", families.GENAI_FP32).path
    in_place = tokens(program, model, PROMPT, "--tokens", NEW, "--head-size", families.HEAD_SIZE, "--in-place")
    assert in_place == tokens(program, model, PROMPT, "--tokens", NEW, "--head-size", families.HEAD_SIZE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_stop_token_and_threads(program: str) -> None:
    model = converted("llama", families.DYNAMO_KV).path
    first = _python(model, PROMPT, 1, library=True)[0]
    assert tokens(program, model, PROMPT, "--stop", first, "--threads", 1) == [first]


@pytest.mark.parametrize("program", PROGRAMS)
def test_errors_name_the_reason(program: str, tmp_path: Path) -> None:
    for arguments in ((), ("model.onnx", "1,x"), ("model.onnx", "1", "--tokens"), ("model.onnx", "1", "--wrong")):
        done = run(program, *arguments)
        assert done.returncode == 2 and "PROMPT_IDS" in done.stderr and done.stdout == ""
    done = run(program, tmp_path / "missing.onnx", "1")
    assert done.returncode == 1 and "missing.onnx" in done.stderr
    done = run(program, converted("llama", families.DYNAMO).path, "1")
    assert done.returncode == 1 and "no key/value cache" in done.stderr
    done = run(program, converted("llama", families.GENAI_FP32).path, "1")
    assert done.returncode == 1 and "--head-size" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("library", [True, False], ids=["kernels", "functions"])
@pytest.mark.parametrize("family", [families.DYNAMO_KV, families.GENAI_FP32])
@pytest.mark.parametrize("program", PROGRAMS)
def test_real_model(program: str, family: str, library: bool) -> None:
    made = real_conversions.converted(family)
    tokenizer = load_tokenizer(real_conversions.tokenizer())
    prompt = tuple(encode_text(tokenizer, TEXT).tolist())
    new = 48 if library else 8
    printed = tokens(program, made.path, prompt, "--tokens", new, *_options(made.in_place, 64, library))
    assert printed == _python(made.path, prompt, new, library=library)
    assert len(printed) == new and len(set(printed)) >= new / 4


def test_text_to_ids_and_back(tmp_path: Path) -> None:
    tiny = families.model("llama", families.DYNAMO_KV)
    script = [sys.executable, str(REPOSITORY / "custom_ops" / "examples" / "text.py")]

    def text(*arguments: str, stdin: str = "") -> str:
        done = subprocess.run([*script, *arguments], input=stdin, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    ids = text("encode", str(tiny.tokenizer), "The old mill")
    assert [int(token) for token in ids.split(",")] == load_tokenizer(tiny.tokenizer).encode("The old mill").ids
    assert text("decode", str(tiny.tokenizer), stdin=ids.replace(",", " ")) == "The old mill"
