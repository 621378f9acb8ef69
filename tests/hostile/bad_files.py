"""Files that are no sound ONNX model: broken protobuf, broken or hostile external data, wrong versions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import base_model
import onnx
from case import Attempt, case

_FILE = "Model file"
_DATA = "External data"
_VERSION = "Versions"


def _bytes(folder: Path, content: bytes) -> Attempt:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return Attempt(path)


def _whole() -> bytes:
    return base_model.model().SerializeToString()


# ---- the model file --------------------------------------------------------------------------------------------------


@case(_FILE, "no such file", "there is no such file")
def missing_file(folder: Path) -> Attempt:
    return Attempt(folder / "model.onnx")


@case(_FILE, "a folder that is no model folder", "holds no genai_config.json")
def folder_for_a_file(folder: Path) -> Attempt:
    (folder / "model.onnx").mkdir()
    return Attempt(folder / "model.onnx")


@case(_FILE, "a named pipe that nobody writes to", "is not a regular file")
def pipe_for_a_file(folder: Path) -> Attempt:
    os.mkfifo(folder / "model.onnx")
    return Attempt(folder / "model.onnx")


@case(_FILE, "a link to itself", "cannot be read (Too many levels of symbolic links)")
def link_to_itself(folder: Path) -> Attempt:
    (folder / "model.onnx").symlink_to("model.onnx")
    return Attempt(folder / "model.onnx")


@case(_FILE, "an empty file", "is not an ONNX model: it has no graph")
def empty_file(folder: Path) -> Attempt:
    return _bytes(folder, b"")


@case(_FILE, "cut off after half of its bytes", "is not a complete ONNX protobuf file")
def half_a_file(folder: Path) -> Attempt:
    content = _whole()
    return _bytes(folder, content[: len(content) // 2])


@case(_FILE, "the last byte missing", "is not a complete ONNX protobuf file")
def last_byte_missing(folder: Path) -> Attempt:
    return _bytes(folder, _whole()[:-1])


@case(_FILE, "followed by 64 bytes of zeros", "is not a complete ONNX protobuf file")
def trailing_zeros(folder: Path) -> Attempt:
    return _bytes(folder, _whole() + bytes(64))


@case(_FILE, "text", "is not a complete ONNX protobuf file")
def text_for_a_model(folder: Path) -> Attempt:
    return _bytes(folder, b"<html><body>404 Not Found</body></html>\n")


@case(_FILE, "a Git LFS pointer", "is a Git LFS pointer")
def lfs_pointer(folder: Path) -> Attempt:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13476925163\n"
    return _bytes(folder, pointer)


@case(_FILE, "a length field of 2 GB over 10 bytes", "is not a complete ONNX protobuf file")
def lying_length(folder: Path) -> Attempt:
    return _bytes(folder, b"\x3a\xff\xff\xff\xff\x07" + b"0123456789")


@case(_FILE, "subgraphs nested 200 deep", "is not a complete ONNX protobuf file")
def deep_nesting(folder: Path) -> Attempt:
    content = b""
    for _ in range(200):  # graph.node.attribute.g, one in the other, as raw protobuf
        for tag in (0x32, 0x2A, 0x0A):
            content = bytes([tag]) + _varint(len(content)) + content
    return _bytes(folder, b"\x08\x0a" + b"\x3a" + _varint(len(content)) + content + b"\x42\x02\x10\x15")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@case(_FILE, "a tensor of fewer bytes than its shape needs", "tensor up: holds 6140 bytes where its shape needs 6144")
def short_tensor(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.graph.initializer[1].raw_data = proto.graph.initializer[1].raw_data[:-4]
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_FILE, "a tensor of shape [2^40, 2^40]", "tensor up: has the impossible shape")
def huge_tensor(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.graph.initializer[1].dims[:] = [2**40, 2**40]
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_FILE, "a tensor of shape [-32, 48]", "tensor up: has the impossible shape")
def negative_tensor(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.graph.initializer[1].dims[:] = [-32, 48]
    return Attempt(base_model.save(proto, folder / "model.onnx"))


# ---- external data ---------------------------------------------------------------------------------------------------


def _external(folder: Path, change: Callable[[Path], None] = lambda data: None, **entries: str) -> Attempt:
    """A model with external data; `change` gets the data file, `entries` replace those of tensor "up"."""
    path = base_model.save(base_model.model(), folder / "model.onnx", external=True)
    change(folder / "model.onnx.data")
    if entries:
        proto = onnx.load(path, load_external_data=False)
        tensor = proto.graph.initializer[1]
        kept = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(proto.SerializeToString())
    return Attempt(path)


@case(_DATA, "sound, beside the model", None)
def sound_data(folder: Path) -> Attempt:
    return _external(folder)


@case(_DATA, "missing", "its external data file model.onnx.data cannot be read: No such file or directory")
def missing_data(folder: Path) -> Attempt:
    return _external(folder, Path.unlink)


@case(_DATA, "one byte short", "external data file model.onnx.data is too short")
def short_data(folder: Path) -> Attempt:
    return _external(folder, lambda data: os.truncate(data, data.stat().st_size - 1))


@case(_DATA, "1 MB longer than needed", None)
def oversized_data(folder: Path) -> Attempt:
    return _external(folder, lambda data: os.truncate(data, data.stat().st_size + 2**20))


@case(_DATA, "a path with `..`", 'its external data path ../secret contains ".."')
def data_above(folder: Path) -> Attempt:
    return _external(folder, location="../secret")


@case(_DATA, "an absolute path", "its external data path /etc/passwd is absolute")
def absolute_data(folder: Path) -> Attempt:
    return _external(folder, location="/etc/passwd")


@case(_DATA, "a Windows path", "is absolute")
def windows_data(folder: Path) -> Attempt:
    return _external(folder, location="C:\\Windows\\win.ini")


@case(_DATA, "a path with a line break", "its external data file")
def data_with_a_line_break(folder: Path) -> Attempt:
    return _external(folder, location="model\n.data")


@case(_DATA, "a link out of the folder", "is a link that leaves the model's folder")
def data_link_out(folder: Path) -> Attempt:
    def move(data: Path) -> None:
        (folder / "elsewhere").mkdir()
        data.rename(folder / "elsewhere" / "secret")
        data.symlink_to("../elsewhere/secret")

    inner = folder / "model"
    inner.mkdir()
    return _external(inner, move)


@case(_DATA, "in a folder that is a link out of the folder", "is a link that leaves the model's folder")
def data_folder_link_out(folder: Path) -> Attempt:
    inner = folder / "model"
    inner.mkdir()

    def move(data: Path) -> None:
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "secret").write_bytes(data.read_bytes())
        (inner / "sub").symlink_to("../elsewhere")

    return _external(inner, move, location="sub/secret")


@case(_DATA, "a link inside the folder", None)
def data_link_inside(folder: Path) -> Attempt:
    def move(data: Path) -> None:
        data.rename(folder / "blob")
        data.symlink_to("blob")

    return _external(folder, move)


def _snapshot_of(folder: Path, blob_of_data: str = "blobs/data") -> Attempt:
    """A Hugging Face cache: the snapshot holds links into a folder of blobs that lies beside it."""
    for name in ("blobs", "snapshots/main", "elsewhere"):
        (folder / name).mkdir(parents=True)
    attempt = _external(folder / "snapshots/main")
    for name, blob in (("model.onnx", "blobs/model"), ("model.onnx.data", blob_of_data)):
        path = folder / "snapshots/main" / name
        path.rename(folder / blob)
        path.symlink_to(Path("../..") / blob)
    return attempt


@case(_DATA, "a Hugging Face cache snapshot: model and data are links into one folder of blobs", None)
def hugging_face_snapshot(folder: Path) -> Attempt:
    return _snapshot_of(folder)


@case(_DATA, "the same, but the data link leads elsewhere", "is a link that leaves the model's folder")
def forged_snapshot(folder: Path) -> Attempt:
    return _snapshot_of(folder, "elsewhere/secret")


@case(_DATA, "a file with a second hard link", "has several hard links")
def hard_link_data(folder: Path) -> Attempt:
    return _external(folder, lambda data: os.link(data, folder / "other"))


@case(_DATA, "a folder", "is not a regular file")
def folder_for_data(folder: Path) -> Attempt:
    def change(data: Path) -> None:
        data.unlink()
        data.mkdir()

    return _external(folder, change)


@case(_DATA, "a named pipe", "is not a regular file")
def pipe_for_data(folder: Path) -> Attempt:
    def change(data: Path) -> None:
        data.unlink()
        os.mkfifo(data)

    return _external(folder, change)


@case(_DATA, "an offset of -4", "external data of 6144 bytes at -4")
def negative_offset(folder: Path) -> Attempt:
    return _external(folder, offset="-4")


@case(_DATA, "an offset of 2^63", "is too short")
def huge_offset(folder: Path) -> Attempt:
    return _external(folder, offset=str(2**63))


@case(_DATA, "an offset of 5000 digits", "its external data offset or length is no number")
def long_offset(folder: Path) -> Attempt:
    return _external(folder, offset="9" * 5000)


@case(_DATA, "an odd offset, so that floats are not aligned", None)
def odd_offset(folder: Path) -> Attempt:
    weight = base_model.weights()["up"].tobytes()
    end = sum(array.nbytes for array in base_model.weights().values())

    def append(data: Path) -> None:
        data.write_bytes(data.read_bytes()[:end].ljust(end + 1, b"\0") + weight)

    return _external(folder, append, offset=str(end + 1))


@case(_DATA, "a length that is not the shape's", "external data of 12 bytes")
def wrong_length(folder: Path) -> Attempt:
    return _external(folder, length="12")


# ---- versions --------------------------------------------------------------------------------------------------------


def _version(folder: Path, opsets: dict[str, int], ir_version: int = 10) -> Attempt:
    return Attempt(base_model.save(base_model.model(opsets=opsets, ir_version=ir_version), folder / "model.onnx"))


@case(_VERSION, "opset 7", None)
def old_opset(folder: Path) -> Attempt:
    return _version(folder, {"": 7}, 3)


@case(_VERSION, "opset 0", "does not say which ONNX operator set it uses")
def no_opset(folder: Path) -> Attempt:
    return _version(folder, {"": 0})


@case(_VERSION, "opset -3", "does not say which ONNX operator set it uses")
def negative_opset(folder: Path) -> Attempt:
    return _version(folder, {"": -3})


@case(_VERSION, "opset 99, newer than any", "opset 99")
def future_opset(folder: Path) -> Attempt:
    return _version(folder, {"": 99})


@case(_VERSION, "no opset of the ONNX domain", "does not say which ONNX operator set it uses")
def foreign_opset_only(folder: Path) -> Attempt:
    return _version(folder, {"com.example": 1})


@case(_VERSION, "the ONNX domain imported twice, as 13 and as 21", "imports the operator set")
def opset_twice(folder: Path) -> Attempt:
    proto = base_model.model()
    proto.opset_import.insert(0, onnx.helper.make_opsetid("", 13))
    return Attempt(base_model.save(proto, folder / "model.onnx"))


@case(_VERSION, "IR version 99", "IR version 99")
def future_ir(folder: Path) -> Attempt:
    return _version(folder, {"": 21}, 99)
