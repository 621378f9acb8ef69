"""Loading refuses broken and hostile files with one clear error; saving is all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from fptq_onnx.errors import ModelError
from fptq_onnx.graph import model_file
from fptq_onnx.graph.model_file import load_model, save_model, source_files

WEIGHT = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)


def _proto(nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    nodes = nodes or [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Relu", ["h"], ["y"])]
    x = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 64])
    y = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 48])
    graph = oh.make_graph(nodes, "g", [x], [y], [onnx.numpy_helper.from_array(WEIGHT, "w")])
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)


def _write(path: Path, proto: onnx.ModelProto, external: bool = False) -> Path:
    onnx.save(proto, path, save_as_external_data=external, location=path.name + ".data", size_threshold=0)
    return path


def _external(tmp_path: Path) -> tuple[Path, onnx.ModelProto]:
    """A model with external data, and its proto to be tampered with."""
    path = _write(tmp_path / "m.onnx", _proto(), external=True)
    return path, onnx.load(path, load_external_data=False)


def _set(proto: onnx.ModelProto, key: str, value: str) -> None:
    tensor = proto.graph.initializer[0]
    entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, text in entries.items():
        tensor.external_data.add(key=name, value=text)


def _refused(path: Path, *words: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert path.name in caught.value.where
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


# ---- loading -------------------------------------------------------------------------------------------------------


def test_external_data_stay_on_disk(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    tensor = load_model(path).graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_relative_path_keeps_working_after_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model("m.onnx")
    monkeypatch.chdir("/")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_nodes_get_unique_names(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("Relu", [f"v{i}" if i else "x"], [f"v{i + 1}"], name=name)
        for i, name in enumerate(["a", "a", "", ""])
    ]
    nodes += [oh.make_node("MatMul", ["v4", "w"], ["y"], name="a")]
    names = [node.name for node in load_model(_write(tmp_path / "m.onnx", _proto(nodes))).graph]
    assert len(set(names)) == len(names) == 5
    assert names[0] == "a"
    assert all(names)


def test_constant_weights_become_initializers(tmp_path: Path) -> None:
    constant = oh.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(WEIGHT))
    path = _write(tmp_path / "m.onnx", _proto([constant, oh.make_node("MatMul", ["x", "c"], ["y"])]))
    assert "c" in load_model(path).graph.initializers


def test_unsorted_nodes_are_put_in_order(tmp_path: Path) -> None:
    proto = _proto()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert [node.op_type for node in load_model(path).graph] == ["MatMul", "Relu"]


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 1000, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    content = _write(tmp_path / "whole.onnx", _proto()).read_bytes()
    path = tmp_path / "m.onnx"
    path.write_bytes(content[:keep])
    _refused(path)


@pytest.mark.parametrize("content", [b"not a model at all", b"\x00" * 64, bytes(range(256)), b"{}"])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    _refused(path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """Any single corrupt byte gives a model or a ModelError, nothing else."""
    nodes = [oh.make_node("MatMul", ["x", "w"], ["h"], name="m"), oh.make_node("Clip", ["h"], ["y"])]
    content = _proto(nodes).SerializeToString()
    structure = [i for i in range(len(content)) if i < 120 or i > len(content) - 120]
    path = tmp_path / "m.onnx"
    outcomes = set()
    for position in structure:
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            try:
                load_model(path)
                outcomes.add("loaded")
            except ModelError:
                outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "there is no such file" in str(_refused(tmp_path / "absent.onnx"))
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(tmp_path)


def test_undefined_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_proto([oh.make_node("MatMul", ["x", "ghost"], ["y"], name="mm")]).SerializeToString())
    _refused(path, "ghost", "mm")


def test_undefined_output_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_proto([oh.make_node("MatMul", ["x", "w"], ["h"])]).SerializeToString())
    _refused(path, "nothing computes the graph output y")


def test_cycle(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("Add", ["x", "b"], ["a"]),
        oh.make_node("Relu", ["a"], ["b"]),
        oh.make_node("Relu", ["a"], ["y"]),
    ]
    path = tmp_path / "m.onnx"
    path.write_bytes(_proto(nodes).SerializeToString())
    _refused(path, "cycle")


def test_undefined_value_in_a_subgraph(tmp_path: Path) -> None:
    value = oh.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    branch = oh.make_graph([oh.make_node("Relu", ["ghost"], ["z"], name="inner")], "branch", [], [value])
    condition = oh.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.array(True)))
    node = oh.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    path = tmp_path / "m.onnx"
    path.write_bytes(_proto([condition, node]).SerializeToString())
    _refused(path, "ghost", "inner")


@pytest.mark.parametrize(
    ("dims", "data_type", "raw", "word"),
    [
        ([64, 48], 1, b"\0" * 100, "holds 100 bytes"),
        ([64, 48], 1, b"\0" * (64 * 48 * 4 + 4), "bytes where its shape needs"),
        ([-1, 48], 1, b"", "impossible shape"),
        ([2**40, 2**40], 1, b"", "impossible shape"),
        ([64, 48], 999, b"", "unknown data type"),
        ([64, 48], 1, None, "holds 0 elements"),
    ],
)
def test_embedded_tensor_of_the_wrong_size(
    tmp_path: Path, dims: list[int], data_type: int, raw: bytes | None, word: str
) -> None:
    proto = _proto()
    tensor = onnx.TensorProto(name="w", dims=dims, data_type=data_type)
    if raw is not None:
        tensor.raw_data = raw
    proto.graph.initializer[0].CopyFrom(tensor)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    _refused(path, word, "tensor w")


def test_zero_size_tensors_are_fine(tmp_path: Path) -> None:
    proto = _proto()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((0, 4), np.float32), "empty"))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert load_model(path).graph.initializers["empty"].shape == (0, 4)


def test_missing_external_data(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (tmp_path / "m.onnx.data").unlink()
    _refused(path, "m.onnx.data", "cannot be read", "tensor w")


def test_short_external_data(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    _refused(path, "too short", "12287 bytes, 12288 needed")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("location", "/etc/passwd", "absolute"),
        ("location", "C:\\data", "absolute"),
        ("location", "\\\\host\\share\\data", "absolute"),
        ("location", "../m.onnx.data", '".."'),
        ("location", "sub/../../m.onnx.data", '".."'),
        ("location", "sub\\..\\data", '".."'),
        ("location", "", "no file"),
        ("location", ".", "not a regular file"),
        ("offset", "-4", "-4"),
        ("offset", "4", "too short"),
        ("offset", "99999999999999999999", "too short"),
        ("offset", "many", "no number"),
        ("length", "12", "12 bytes"),
        ("length", "-1", "-1 bytes"),
        ("length", "1e3", "no number"),
    ],
)
def test_hostile_external_data_entry(tmp_path: Path, key: str, value: str, word: str) -> None:
    path, proto = _external(tmp_path)
    _set(proto, key, value)
    path.write_bytes(proto.SerializeToString())
    _refused(path, word, "tensor w")


def test_link_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, _ = _external(folder)
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "m.onnx.data").read_bytes())
    (folder / "m.onnx.data").unlink()
    (folder / "m.onnx.data").symlink_to(secret)
    _refused(path, "link that leaves the model's folder")
    (folder / "m.onnx.data").unlink()
    os.link(secret, folder / "m.onnx.data")
    _refused(path, "hard links")


def test_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (tmp_path / "m.onnx.data").rename(tmp_path / "blob")
    (tmp_path / "m.onnx.data").symlink_to("blob")
    tensor = load_model(path).graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_external_data_in_an_attribute_are_checked_too(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(WEIGHT)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    constant = oh.make_node("Constant", [], ["c"], value=tensor)
    path = tmp_path / "m.onnx"
    path.write_bytes(_proto([constant, oh.make_node("MatMul", ["x", "c"], ["y"])]).SerializeToString())
    _refused(path, "absolute")


# ---- saving --------------------------------------------------------------------------------------------------------


def _listing(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("external", [False, True])
def test_round_trip(tmp_path: Path, external: bool) -> None:
    model = load_model(_write(tmp_path / "m.onnx", _proto(), external))
    before = _listing(tmp_path)
    save_model(model, tmp_path / "out.onnx")
    wanted = {"out.onnx", "out.onnx.data"} if external else {"out.onnx"}
    after = _listing(tmp_path)
    assert after.keys() - before.keys() == wanted
    assert before.items() <= after.items(), "the input changed"
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    again = load_model(tmp_path / "out.onnx").graph.initializers["w"].const_value
    assert again is not None
    np.testing.assert_array_equal(again.numpy(), WEIGHT)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor) == external, "the model changed"


def test_large_models_get_external_data_on_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "EXTERNAL_DATA_THRESHOLD", WEIGHT.nbytes - 1)
    proto = _proto()
    proto.graph.initializer.insert(0, onnx.numpy_helper.from_array(np.zeros(2000, np.int8), "odd"))
    save_model(load_model(_write(tmp_path / "m.onnx", proto)), tmp_path / "out.onnx")
    loaded = load_model(tmp_path / "out.onnx")
    offsets = [
        t.const_value.offset for t in loaded.graph.initializers.values() if isinstance(t.const_value, ir.ExternalTensor)
    ]
    assert len(offsets) == 2
    assert all(offset is not None and offset % 4096 == 0 for offset in offsets)


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    digests = []
    for _ in range(2):
        save_model(load_model(path), tmp_path / "out.onnx")
        digests.append((_listing(tmp_path)["out.onnx"], _listing(tmp_path)["out.onnx.data"]))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["m.onnx", "sub/../m.onnx", "link.onnx", "m"])
def test_input_is_never_overwritten(tmp_path: Path, name: str) -> None:
    """Neither the model file nor, by its derived name, the data file (output "m" would write "m.data")."""
    path = _write(tmp_path / "m.onnx", _proto(), external=True)
    (tmp_path / "m.data").write_bytes((tmp_path / "m.onnx.data").read_bytes())
    proto = onnx.load(path, load_external_data=False)
    _set(proto, "location", "m.data")
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.onnx").symlink_to(path)
    model = load_model(path)
    assert source_files(model) == {path.resolve(), (tmp_path / "m.data").resolve()}
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ModelError, match="the model is read from"):
        save_model(model, tmp_path / name)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_saving_over_an_older_output_replaces_it(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (tmp_path / "out.onnx").write_bytes(b"old")
    (tmp_path / "out.onnx.data").write_bytes(b"old")
    save_model(load_model(path), tmp_path / "out.onnx")
    assert load_model(tmp_path / "out.onnx").graph.initializers["w"].shape == WEIGHT.shape


@pytest.mark.parametrize(
    ("replaced", "goes"),
    [("a model that names them", True), ("a model that names others", False), ("no model", False), ("a link", False)],
)
def test_data_of_a_replaced_model_go_only_where_they_are_its_own(tmp_path: Path, replaced: str, goes: bool) -> None:
    small = load_model(_write(tmp_path / "small.onnx", _proto()))
    out, data = tmp_path / "out.onnx", tmp_path / "out.onnx.data"
    old = _write(tmp_path / "old.onnx" if replaced == "a link" else out, _proto(), external=True)
    if replaced == "a link":
        out.symlink_to(old)
        data.write_bytes(b"whose?")
    elif replaced == "no model":
        out.write_bytes(b"text")
    elif replaced == "a model that names others":
        proto = onnx.load(out, load_external_data=False)
        _set(proto, "location", "weights.bin")
        out.write_bytes(proto.SerializeToString())
        (tmp_path / "weights.bin").write_bytes(data.read_bytes())
    before = set(_listing(tmp_path))
    save_model(small, out)
    assert load_model(out).graph.initializers["w"].const_value is not None
    assert before - set(_listing(tmp_path)) == ({data.name} if goes else set())


@pytest.mark.parametrize("external", [False, True])
def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    model = load_model(_write(tmp_path / "m.onnx", _proto(), external))
    (tmp_path / "out.onnx").write_bytes(b"old")
    before = _listing(tmp_path)

    def full_disk(_model: ir.Model, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_file.ir, "save", full_disk)
    with pytest.raises(ModelError, match="No space left"):
        save_model(model, tmp_path / "out.onnx")
    assert _listing(tmp_path) == before


def test_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(_write(tmp_path / "m.onnx", _proto()))
    before = _listing(tmp_path)

    def interrupted(_model: ir.Model, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_file.ir, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "out.onnx")
    assert _listing(tmp_path) == before


def test_output_folder_missing_or_output_a_folder(tmp_path: Path) -> None:
    model = load_model(_write(tmp_path / "m.onnx", _proto()))
    with pytest.raises(ModelError, match="cannot be written"):
        save_model(model, tmp_path / "absent" / "out.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    save_model(load_model(path), tmp_path / "out.onnx")
    umask = os.umask(0)
    os.umask(umask)
    for name in ("out.onnx", "out.onnx.data"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
