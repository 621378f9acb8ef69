"""The GPU benchmark's parts that need no GPU: problems and their exact results, models, feeds, records, tables."""

import json
import re
from types import SimpleNamespace

import bench_gpu
import make_tables
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from gpu_bench import models, records
from gpu_bench.decoder import Decoder
from gpu_bench.onnx_models import Activation, Format, layer_model, static_scale, write_chain
from gpu_bench.peers import COLD_BYTES, cold_copies
from gpu_bench.problem import (
    Shape,
    excess_error,
    pack_int4,
    quantize_per_token,
    random_activations,
    random_weight,
    reference,
)
from gpu_bench.random_decoder import DecoderConfig, write_decoder
from gpu_bench.sessions import op_library
from gpu_bench.tables import markdown_table
from gpu_bench.timing import Timing, interleave

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("structured", [False, True])
def test_random_weight_is_really_quantized(generator, dtype, structured):
    weight = random_weight(Shape(300, 40), 128, dtype, generator, structured=structured)
    assert weight.values.shape == (300, 40)
    assert weight.scale.shape == (3, 40)
    assert weight.scale.dtype == dtype
    assert set(range(-7, 8)) <= set(weight.values.unique().tolist()) <= set(range(-8, 8))
    assert 0.5 < float(weight.dequantized().std()) * 300**0.5 < 1.5
    if structured:
        scale = weight.scale.double().numpy()
        assert scale.min() < 0 < scale.max()
        for column in scale.T:
            base = min(abs(c) / i for c in column for i in range(1, 16) if _multiples(column, abs(c) / i))
            assert base > 0


def _multiples(column, base):
    ratio = np.abs(column) / base
    return bool((ratio == np.round(ratio)).all() and (ratio >= 1).all() and (ratio <= 15).all())


def test_packing_is_onnx_int4(generator):
    values = torch.randint(-8, 8, (7, 5), dtype=torch.int8, generator=generator)
    packed = pack_int4(values)
    tensor = onnx.helper.make_tensor("B", onnx.TensorProto.INT4, [7, 5], packed.numpy().tobytes(), raw=True)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values.numpy())


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_reference_is_exact_arithmetic(generator, zero_point):
    weight = random_weight(Shape(70, 9), 32, torch.float16, generator)
    a = torch.randint(0, 256, (4, 70), dtype=torch.uint8, generator=generator)
    a_scale = torch.rand(4, 1, generator=generator)
    expected = np.zeros((4, 9))
    for group in range(3):
        rows = slice(32 * group, 32 * (group + 1))
        integers = (a.numpy()[:, rows].astype(np.int64) - zero_point) @ weight.values.numpy()[rows].astype(np.int64)
        expected += integers * weight.scale.numpy()[group].astype(np.float64)
    expected *= a_scale.numpy().astype(np.float64)
    np.testing.assert_allclose(reference(a, a_scale, weight, zero_point).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_excess_error_is_what_rounding_does_not_explain(generator, dtype):
    expected = torch.randn(40, 50, dtype=torch.float64, generator=generator)
    expected *= torch.logspace(-4, 3, 40, dtype=torch.float64).unsqueeze(1)
    assert excess_error(expected.to(dtype), expected) < 1e-7
    assert excess_error((expected * (1 + 3e-3)).to(dtype), expected) == pytest.approx(3e-3, rel=0.02)
    missing = expected.to(dtype)
    missing[3, 4] = float("nan")
    assert excess_error(missing, expected) == float("inf")


def test_quantize_per_token_is_the_operator(generator):
    """The benchmark's definition and the operator library's CPU kernel agree bit by bit."""
    x = random_activations(5, 96, torch.float32, generator)
    x[2] = 0
    model = layer_model(random_weight(Shape(96, 8), 32, torch.float32, generator), Activation.PER_TOKEN)
    _, a, a_scale = _cpu(model).run(None, {"X": x.numpy()})
    quantized, scale = quantize_per_token(x)
    assert np.array_equal(a, quantized.numpy())
    assert np.array_equal(a_scale, scale.numpy())


def _cpu(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(op_library())
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("structured", [False, True])
def test_layer_model_computes_the_reference(generator, activation, structured):
    weight = random_weight(Shape(130, 24), 64, torch.float32, generator, structured=structured)
    zero_point = 128 if activation is Activation.PER_TOKEN else 100
    session = _cpu(layer_model(weight, activation, rank=3, zero_point=zero_point))
    if activation is Activation.QUANTIZED:
        a = torch.randint(0, 256, (2, 3, 130), dtype=torch.uint8, generator=generator)
        a_scale = torch.rand(2, 3, 1, generator=generator)
        (y,) = session.run(None, {"A": a.numpy(), "a_scale": a_scale.numpy()})
    else:
        x = random_activations(6, 130, torch.float32, generator).view(2, 3, 130)
        y, a, *rest = session.run(None, {"X": x.numpy()})
        a = torch.from_numpy(a)
        a_scale = torch.from_numpy(rest[0]) if rest else static_scale(torch.float32).expand(2, 3, 1)
    expected = reference(a.view(6, 130), a_scale.reshape(6, 1), weight, zero_point)
    assert excess_error(torch.from_numpy(y).view(6, 24), expected) < 1e-5


@pytest.mark.parametrize("form", list(Format))
def test_chain_runs_in_onnxruntime(tmp_path, generator, form):
    shapes = (Shape(128, 256), Shape(256, 128))
    path = write_chain(tmp_path / "chain.onnx", shapes, form, layers=4, copies=1, generator=generator)
    onnx.checker.check_model(str(path))
    x = random_activations(3, 128, torch.float16, generator).numpy()
    (y,) = _cpu(str(path)).run(None, {"X": x})
    assert y.shape == (3, 128)
    # Weights of variance 1/K keep the size of the activations.
    assert 0.3 < np.linalg.norm(y.astype(np.float64)) / np.linalg.norm(x.astype(np.float64)) < 3


def test_formats_hold_the_same_weight(tmp_path):
    """MatMulNBits and W4A8 chains of one seed hold one weight, so that their outputs differ by rounding alone."""
    shapes = (Shape(256, 128), Shape(128, 256))
    x = random_activations(3, 256, torch.float16, torch.Generator().manual_seed(1)).numpy()
    outputs = {}
    for form in (Format.NBITS_128, Format.W4A8):
        path = write_chain(tmp_path / f"{form.name}.onnx", shapes, form, 2, 1, torch.Generator().manual_seed(5))
        (outputs[form],) = _cpu(str(path)).run(None, {"X": x})
    a, b = (outputs[form].astype(np.float64) for form in outputs)
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


@pytest.mark.parametrize("form", [Format.FLOAT16, Format.NBITS_32, Format.W4A8, Format.W4A8_FUSED])
def test_random_decoder_decodes_as_it_prefills(tmp_path, form):
    """One step through the cache gives the logits of the whole prompt's last position."""
    config = DecoderConfig(2, 192, 320, 6, 2, 32, 50, positions=64)
    path = write_decoder(tmp_path / "model.onnx", config, form, torch.Generator().manual_seed(2))
    session = _cpu(str(path))
    decoder = Decoder(onnx.load(path, load_external_data=False).graph)
    assert decoder.shared_cache

    def run(past, tokens):
        step = decoder.step(session, 1, past, tokens, "cpu", torch.Generator().manual_seed(1))
        return {name: tensor.numpy() for name, tensor in step.inputs.items()}

    prompt = run(0, 8)
    names = [out.name for out in session.get_outputs()]
    whole = dict(zip(names, session.run(None, prompt), strict=True))
    assert np.isfinite(whole["logits"]).all()
    last = run(7, 1)
    last["input_ids"] = prompt["input_ids"][:, 7:]
    for name in last:
        if name.startswith("past"):
            last[name] = whole[name.replace("past_key_values", "present")][:, :, :8]
    (logits,) = session.run(["logits"], last)
    np.testing.assert_allclose(logits[0, 0], whole["logits"][0, 7], rtol=0.05, atol=0.1)


def test_chain_that_does_not_fit_is_refused(tmp_path, generator):
    with pytest.raises(ValueError, match="do not chain"):
        write_chain(tmp_path / "x.onnx", (Shape(8, 16), Shape(8, 8)), Format.W4A8, 2, 1, generator)


def test_cold_weights_exceed_the_cache():
    for size in (1_000_000, 8_388_608, 500_000_000):
        assert cold_copies(size) >= 2
        assert cold_copies(size) * size >= COLD_BYTES


def test_peers_take_turns():
    order = []
    timers = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    result = interleave(timers, rounds=3)
    assert "".join(order) == "abcabcabc"
    assert result["b"] == Timing(5.0, 2.0, 8.0)


def _session(*values):
    inputs, outputs = values
    return SimpleNamespace(
        get_inputs=lambda: [SimpleNamespace(name=n, type=t, shape=s) for n, t, s in inputs],
        get_outputs=lambda: [SimpleNamespace(name=n, type=t, shape=s) for n, t, s in outputs],
    )


@pytest.mark.parametrize("shared", [False, True])
def test_decoder_feeds(shared):
    node = onnx.helper.make_node("GroupQueryAttention" if shared else "MatMul", ["a"], ["b"])
    decoder = Decoder(onnx.helper.make_graph([node], "g", [], []))
    session = _session(
        [
            ("input_ids", "tensor(int64)", ["B", "S"]),
            ("attention_mask", "tensor(int64)", ["B", "T"]),
            ("position_ids", "tensor(int64)", ["B", "S"]),
            ("past_key_values.0.key", "tensor(float16)", ["B", 3, "P", 64]),
        ],
        [
            ("logits", "tensor(float16)", ["B", "S", 100]),
            ("present.0.key", "tensor(float16)", ["B", 3, "T", 64]),
        ],
    )
    step = decoder.step(session, batch=2, past=7, tokens=1, device="cpu", generator=torch.Generator())
    shapes = {name: tuple(tensor.shape) for name, tensor in step.inputs.items()}
    assert shapes["input_ids"] == (2, 1)
    assert shapes["attention_mask"] == (2, 8)
    assert shapes["past_key_values.0.key"] == (2, 3, 8 if shared else 7, 64)
    assert step.inputs["position_ids"].tolist() == [[7], [7]]
    assert step.outputs["present.0.key"].shape == (2, 3, 8, 64)
    assert (step.outputs["present.0.key"] is step.inputs["past_key_values.0.key"]) == shared
    assert step.outputs["logits"].shape == (2, 1, 100)
    unknown = _session([("pixel_values", "tensor(float)", [1])], [("logits", "tensor(float)", ["B", "S", 9])])
    with pytest.raises(ValueError, match="pixel_values"):
        decoder.step(unknown, 1, 0, 4, "cpu", torch.Generator())


def test_a_model_with_bad_logits_gets_no_figure(monkeypatch):
    class Run:
        def __init__(self, *arguments):
            pass

        def timer(self):
            return lambda: 10.0

    def decoder(logit):
        return SimpleNamespace(step=lambda *_: SimpleNamespace(inputs={}, outputs={"logits": torch.tensor([logit])}))

    monkeypatch.setattr(models, "BoundRun", Run)
    decoders = {"good": decoder(1.0), "bad": decoder(float("nan"))}
    facts = {label: {"cuda_graph": False} for label in decoders}
    arguments = SimpleNamespace(prefill=8, past=8, seed=0)
    (row,) = models._measure("decode", 2, 0, dict.fromkeys(decoders), decoders, facts, arguments)
    assert row["tokens_per_s"] == {"good": {"median": 200000.0, "min": 200000.0, "max": 200000.0}}
    assert row["failures"] == {"bad": "logits are not finite"}


def test_records_are_kept(tmp_path):
    head = {**records.environment(), "gpu": {"name": "NVIDIA H200", "driver": "580.1"}}
    body = {"protocol": {"rounds": 5, "chain": ["8->16", "16->8"]}, "rows": [_row(1, 2.0), _row(16, 345.6)]}
    first = records.write_record("gpu-operators", head, body, tmp_path)
    second = records.write_record("gpu-operators", head, body, tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-nvidia-h200-gpu-operators\.json", first.name)
    assert second.stem == f"{first.stem}-2"
    loaded = records.load_records(tmp_path)
    assert [record["file"] for record in loaded] == [first.name, second.name]
    assert {"commit", "command", "versions", "gpu_after"} <= loaded[0].keys()
    (tmp_path / "other.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="not a benchmark record"):
        records.load_records(tmp_path)


def _row(tokens, us):
    return {"tokens": tokens, "us": {"fp16": {"median_us": us, "min_us": us, "max_us": us}}}


def test_tables_are_drawn_between_their_markers(tmp_path):
    head = {**records.environment(), "gpu": {"name": "NVIDIA H200", "driver": "580.1"}}
    body = {"protocol": {"rounds": 5, "chain": ["8->16"]}, "rows": [_row(1, 2.0), _row(16, 345.6)]}
    records.write_record("gpu-operators", head, body, tmp_path)
    text = "a\n<!-- table: gpu-operators -->\nold\n<!-- end of table -->\nb\n"
    drawn = make_tables.redraw(text, records.load_records(tmp_path))
    assert "old" not in drawn
    assert drawn.startswith("a\n<!-- table: gpu-operators -->\nMicroseconds")
    assert drawn.endswith("<!-- end of table -->\nb\n")
    assert re.search(r"\| 16 +\| +346 \|", drawn)
    assert "NVIDIA H200, driver 580.1" in drawn
    assert make_tables.redraw(drawn, records.load_records(tmp_path)) == drawn
    with pytest.raises(KeyError, match="no record of kind 'gpu-models'"):
        make_tables.draw("gpu-models", records.load_records(tmp_path))
    with pytest.raises(KeyError, match="no table is called 'x'"):
        make_tables.draw("x", [])


@pytest.mark.parametrize("lost", ["<!-- table: gpu-operators -->\n", "<!-- end of table -->\n"])
def test_a_marker_without_its_counterpart_is_refused(lost):
    table = "<!-- table: gpu-operators -->\n<!-- end of table -->\n"
    with pytest.raises(KeyError, match="no counterpart"):
        make_tables.redraw(f"{table}prose\n{table}".replace(lost, "", 1), [])


def test_processor_tables_take_records_with_different_peers():
    rows = [
        {"phase": "prefill 8", "threads": threads, "tokens_per_s": speeds}
        for threads, speeds in ((1, {"float32": 10.0}), (2, {"float32": 20.0, "W4A8": 45.0}))
    ]
    machine = {"cpu": "x", "vector_sets": ["avx2"], "versions": {"onnxruntime": "1.31.1"}}
    made = [
        {"kind": "cpu-models", "created": "2026-11-25", "file": f"{i}.json", "machine": machine, "rows": [row]}
        for i, row in enumerate(rows)
    ]
    cells = [
        re.split(r" *\| *", line)
        for line in make_tables.draw("cpu-models", made).splitlines()
        if "| 8" in line or "prefill" in line
    ]
    assert [row[1:5] for row in cells] == [["prefill 8", "1", "10", "-"], ["prefill 8", "2", "20", "45"]]


def test_committed_records_can_be_drawn():
    committed = records.load_records()
    for kind in {record["kind"] for record in committed} & make_tables.TABLES.keys():
        assert make_tables.draw(kind, committed).count("\n") > 5


def test_rows_of_other_shapes_come_along(tmp_path):
    head = {**records.environment(), "gpu": {"name": "NVIDIA H200", "driver": "580.1"}, "commit": "one"}
    for shape, us in (("8->16", 1.0), ("8->16", 2.0), ("16->8", 3.0)):
        rows = [{"shape": shape, **_row(1, us)}]
        records.write_record("gpu-kernels", head, {"protocol": {"rounds": 5}, "rows": rows}, tmp_path)
    drawn = make_tables.draw("gpu-kernels", records.load_records(tmp_path))
    assert re.findall(r"\| (\d+->\d+) +\| +1 \| +(\S+) \|", drawn) == [("8->16", "2.0"), ("16->8", "3.0")]
    other = {**head, "commit": "two"}
    rows = [{"shape": "4->4", **_row(1, 4.0)}]
    records.write_record("gpu-kernels", other, {"protocol": {"rounds": 5}, "rows": rows}, tmp_path)
    assert "16->8" not in make_tables.draw("gpu-kernels", records.load_records(tmp_path))


def test_markdown_table_pads():
    assert markdown_table(["M", "us"], [["1", "2.5"]]) == "| M   |  us |\n|-----|----:|\n| 1   | 2.5 |"
    with pytest.raises(ValueError, match="has 1 cells, expected 2"):
        markdown_table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    "line",
    [
        "kernels --library x.so --quick",
        "kernels --library x.so --shapes 4096x14336 --tokens 1 16 --peers W4A8 humming",
        "operators --layers 8 --tokens 1",
        "models a=a.onnx b@fpA_intB=b.onnx --batches 1 4",
    ],
)
def test_command_line(line):
    assert bench_gpu.parser().parse_args(line.split()).mode == line.split()[0]


def test_bench_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", "operators"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main() == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_readme_tables_are_those_of_the_records():
    text = (records.RECORDS_DIRECTORY.parent.parent / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert make_tables.redraw(text, records.load_records()) == text


def test_each_network_of_the_newest_occasion_has_a_table(tmp_path):
    def write(device, created, network, rate):
        head = {**records.environment(), "gpu": {"name": device, "driver": "580.1"}, "created": created}
        row = {"phase": "decode", "batch": 1, "tokens": 1, "tokens_per_s": {"W4A8": {"median": rate}}}
        body = {"protocol": {"rounds": 5, "network": network}, "models": {"W4A8": {}}, "rows": [row]}
        records.write_record("gpu-models", head, body, tmp_path)

    write("H200", "2026-01-01T10:00:00", "old", 1.0)
    write("H100", "2026-01-02T09:00:00", "other", 1.0)
    write("H200", "2026-01-02T10:00:00", "8B", 2.0)
    write("H200", "2026-01-02T11:00:00", "small", 3.0)
    write("H200", "2026-01-02T12:00:00", "8B", 4.0)
    drawn = make_tables.draw("gpu-models", records.load_records(tmp_path))
    assert re.findall(r"through onnxruntime, (\w+)\.", drawn) == ["8B", "small"]
    assert re.findall(r"\| decode, 1 x 1 \| +(\d) \|", drawn) == ["4", "3"]
