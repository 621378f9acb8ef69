"""The command line as a user runs it: output, one line per error, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import families
import numpy as np
import pytest
from click.testing import Result
from conversions import LENGTH, WINDOWS, converted
from typer.testing import CliRunner

import fptq_onnx
from fptq_onnx.cli import app
from fptq_onnx.graph.feeds import describe_inputs
from fptq_onnx.graph.model_file import load_model
from fptq_onnx.quantization.plan import Plan

SMALL = ("--recipe", "paper", "--set", f"calibration.windows={WINDOWS}", "--set", f"calibration.length={LENGTH}")
GROUP_32 = (*SMALL, "--set", "weights.group_size=32")
COMMANDS = ("analyze", "convert", "evaluate", "export", "generate", "package", "bench", "doctor")


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def _fails(code: int, *arguments: object) -> str:
    """Run a command that must fail with `code`; its one line of error."""
    result = _run(*arguments)
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.endswith(errors[0] + "\n")
    assert result.stdout == "" and "Traceback" not in result.stderr
    return errors[0].removeprefix("error: ")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny Llama with its tokenizer, alone in a folder."""
    tiny = families.model("llama", families.DYNAMO)
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer.read_bytes())
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny.path.read_bytes())
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("She counted the coins twice before she paid for the bread and the two red apples. " * 12)
    return path


def _process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, as the installed script starts it."""
    environment = os.environ | {"PYTHONPATH": str(Path(fptq_onnx.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    script = "import sys; from fptq_onnx.cli import main; sys.argv[0] = 'fptq-onnx'; main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_process_from_start_to_end(model: Path) -> None:
    """Progress and announcements on stderr, one JSON object on stdout, files beside the input."""
    done = _process("convert", "model.onnx", *GROUP_32, "--verify-tokens", LENGTH, "--json", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["output"] == "model.fptq.onnx" and report["data_free"]
    first, *stages = done.stderr.splitlines()
    assert first == "no --calibration: calibrating data-free on random tokens"
    stages = [line.split(":")[0] for line in stages]
    assert stages == ["estimate", "Calibrating", "Quantizing", "Verifying", "Comparing layers", stages[-1]]
    assert stages[-1].startswith("peak memory ")
    assert json.loads(model.with_name("model.fptq.json").read_text()) == report
    converted_here = model.with_name("model.fptq.onnx").read_bytes()
    assert converted_here == converted("llama", families.DYNAMO).path.read_bytes()


def test_process_that_fails(tmp_path: Path) -> None:
    done = _process("convert", "missing.onnx", "--calibration", "data.npz", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "missing.onnx: there is no such file. Check" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    result = _run(command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout and "--json" in result.stdout


def test_help_of_all_and_version() -> None:
    text = _run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "[export]" in text  # rich takes brackets for markup
    assert "[default: MODEL.fptq.onnx]" in " ".join(_run("convert", "-h").stdout.replace("│", "").split())
    result = _run("--version")
    assert result.exit_code == 0 and result.stdout == f"{fptq_onnx.__version__}\n"
    assert _run().exit_code == 2


def test_convert_prints_a_table(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "[bold]out.onnx"  # markup in a name is no markup
    result = _run("convert", model, "-o", output, *SMALL, "--verify-tokens", LENGTH)
    assert result.exit_code == 0, result.stderr
    assert output.is_file() and output.with_suffix(".json").is_file()
    lines = result.stdout
    assert "[bold]out.onnx" in lines
    assert "22 linear layers: 14 static, 1 per-token, 6 equalized-static, 1 float; 6 other MatMul/Gemm nodes" in lines
    assert f"verified on {LENGTH} tokens of {WINDOWS} windows of {LENGTH} random tokens (data-free, seed 0)" in lines
    assert "mean KL " in lines and "MB -> " in lines


def test_convert_options(model: Path, text: Path, tmp_path: Path) -> None:
    """Everything that can be said on the command line reaches the conversion."""
    output = tmp_path / "out.onnx"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nweights: {grid: signed8}\nactivations: {v0: 2.0}\n")
    options = ("--recipe", recipe, "--set", "weights.scales=integer", "--set", "activations.symmetric=false")
    options += ("--exclude", r"block\.0", "--exclude", r".*\.o", "--format", "qdq", "--calibration", text)
    result = _run("convert", model, "-o", output, *SMALL, *options, "--verify-tokens", 0, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["format"] == "qdq" and report["verification"] is None and not report["data_free"]
    assert report["calibration"].endswith("tokens of text.txt")
    resolved = report["recipe"]
    assert (resolved["name"], resolved["weights"]["grid"], resolved["weights"]["scales"]) == (
        "mine",
        "signed8",
        "integer",
    )
    assert resolved["activations"]["symmetric"] is False and resolved["activations"]["v0"] == 2
    assert resolved["layers"]["exclude"] == [r"block\.0", r".*\.o"]
    floats = {layer["label"] for layer in report["layers"] if layer["scheme"] == "float"}
    assert floats == {
        *(f"block.0.{role}" for role in ("q", "k", "v", "o", "gate", "up", "down")),
        *("block.1.o", "block.2.o", "lm_head"),
    }
    assert "no --calibration" not in result.stderr


def test_dry_run_and_plan(model: Path) -> None:
    path = model.with_name("model.fptq.plan.json")
    assert f"plan: {path} (edit it" in _run("convert", model, *GROUP_32, "--dry-run").stdout.replace("\n", "")
    assert not model.with_name("model.fptq.onnx").exists()
    edited = json.loads(path.read_text())
    for entry in edited["layers"]:
        if entry["label"] == "block.0.o":
            entry["scheme"] = "per-token"
    path.write_text(json.dumps(edited))
    result = _run("convert", model, *GROUP_32, "--plan", path, "--verify-tokens", 0, "--json")
    schemes = {layer["label"]: layer["scheme"] for layer in json.loads(result.stdout)["layers"]}
    assert schemes["block.0.o"] == "per-token" and schemes["block.0.q"] == "static"
    assert Plan.load(path)["block.0.o"].scheme == "per-token"

    edited["layers"][0]["label"] = "block.9.q"
    path.write_text(json.dumps(edited))
    assert "block.9.q: the model has no such layer. Remove the entry." in _fails(
        1, "convert", model, *SMALL, "--plan", path
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_missed_threshold(model: Path, as_json: bool) -> None:
    """Exit 3, with the report as always and the model kept."""
    options = ("--verify-tokens", LENGTH, "--max-kl", 0.001)
    result = _run("convert", model, *SMALL, *options, *(["--json"] if as_json else []))
    assert result.exit_code == 3
    assert "is over the allowed 0.001. Keep more layers float" in result.stderr
    assert model.with_name("model.fptq.onnx").is_file()
    if as_json:
        assert json.loads(result.stdout)["verification"]["passed"] is False
    else:
        assert "mean KL is over the allowed 0.001" in result.stdout


def test_errors_are_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    assert "no linear layer would be quantized: excluded by '.*'" in _fails(
        1, "convert", model, "--exclude", ".*", *SMALL
    )
    assert "this is the file the model is read from" in _fails(1, "convert", model, "-o", model)
    assert "recipe '[bold]': there is no such recipe" in _fails(1, "convert", model, "--recipe", "[bold]")
    assert "there is no such field. Use grid." in _fails(1, "convert", model, "--set", "weights.gird=1")
    assert "size 'much': it is not a size. Write it like 8GiB." in _fails(1, "convert", model, "--max-memory", "much")
    assert "holds files of something else" in _fails(1, "convert", model, "--work-dir", tmp_path, *SMALL)
    assert "no.txt: there is no such file" in _fails(1, "convert", model, "--calibration", tmp_path / "no.txt")
    (tmp_path / "tokenizer.json").unlink()
    assert "there is no tokenizer" in _fails(1, "convert", model, "--calibration", text)
    assert "there is no tokenizer.json beside it. Give one" in _fails(1, "evaluate", model, "--text", text)
    assert "config.json" in _fails(1, "export", tmp_path, tmp_path / "exported")
    assert model.read_bytes() == before
    assert not list(tmp_path.glob("*.fptq.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert",),
        ("convert", "model.onnx", "--format", "tflite"),
        ("convert", "model.onnx", "--set", "weights.grid"),
        ("convert", "model.onnx", "--set", "weights.grid=[a"),
        ("convert", "model.onnx", "--verify-tokens", "-1"),
        ("evaluate", "model.onnx"),
        ("evaluate", "model.onnx", "--text", "t.txt", "--window", "1"),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_use_exits_2(arguments: tuple[str, ...]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr and result.stdout == ""


def test_verbose_names_decisions(model: Path) -> None:
    done = _process("-v", "convert", "model.onnx", *SMALL, "--dry-run", cwd=model.parent)
    assert done.returncode == 0 and "observed 12 activations over 2 batches, 48 tokens" in done.stderr


def test_evaluate(model: Path, text: Path) -> None:
    result = converted("llama", families.DYNAMO)
    arguments = ("evaluate", result.path, "--text", text, "--tokenizer", model.with_name("tokenizer.json"))
    arguments += ("--window", 16, "--max-tokens", 60)
    both = json.loads(_run(*arguments, "--against", model, "--json").stdout)
    assert set(both) == {
        *("perplexity", "tokens", "seconds", "tokens_per_second", "kl_mean", "top1_agreement"),
        "reference_perplexity",
    }
    assert both["tokens"] == 60 and both["kl_mean"] > 0 and 0 < both["top1_agreement"] < 1
    floats = json.loads(_run("evaluate", model, *arguments[2:], "--json").stdout)
    # The folder of a model stands for it, as for the other commands.
    (model.parent / "one.txt").write_text("one")
    short = ("evaluate", model, "--text", model.parent / "one.txt", *arguments[4:])
    assert re.search(r"one\.txt: holds \d+ tokens, less than one window of \d+\. Give more", _fails(1, *short))
    in_folder = json.loads(_run("evaluate", model.parent, *arguments[2:], "--json").stdout)
    assert in_folder["perplexity"] == floats["perplexity"]
    assert floats["perplexity"] == pytest.approx(both["reference_perplexity"], rel=1e-5)
    assert floats["kl_mean"] is None and floats["perplexity"] != pytest.approx(both["perplexity"], rel=1e-3)

    shown = _run(*arguments, "--against", model)
    assert shown.exit_code == 0
    assert f"perplexity      {both['perplexity']:.3f}  (60 tokens, windows of 16)" in shown.stdout
    assert f"mean KL         {both['kl_mean']:.4f} nats per token" in shown.stdout
    assert "tokens/s" in shown.stdout


def test_evaluate_names_the_window_that_was_used(text: Path) -> None:
    """A model with learned positions takes no more than it has."""
    tiny = families.model("gpt2", families.DYNAMO)
    shown = _run("evaluate", tiny.path, "--text", text, "--tokenizer", tiny.tokenizer, "--max-tokens", 10)
    positions = describe_inputs(load_model(tiny.path)).positions
    assert f"({positions - 1} tokens, windows of {positions})" in shown.stdout, shown.output


@pytest.mark.slow
def test_export_then_convert(tmp_path: Path) -> None:
    """From a Hugging Face directory to a quantized model in two commands."""
    folder = tmp_path / "exported"
    result = _run("export", families.checkpoint("llama"), folder, "--no-kv-cache", "--json")
    assert result.exit_code == 0, result.stderr
    exported = json.loads(result.stdout)
    assert exported["path"] == str(folder / "model.onnx") and (folder / "tokenizer.json").is_file()
    model = load_model(folder / "model.onnx")
    assert [value.name for value in model.graph.outputs] == ["logits"]
    token_ids = np.arange(12, dtype=np.int64)[None]
    tiny = families.model("llama", families.DYNAMO)
    np.testing.assert_allclose(tiny.run(token_ids, folder / "model.onnx"), tiny.run(token_ids), rtol=1e-5, atol=1e-5)
    converting = _run("convert", folder / "model.onnx", *SMALL, "--verify-tokens", LENGTH, "--max-kl", 10)
    assert converting.exit_code == 0, converting.stderr
    assert (folder / "model.fptq.onnx").is_file()
