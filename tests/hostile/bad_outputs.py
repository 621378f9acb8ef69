"""Outputs that cannot be written or must not be: the input under another name, disks that are full or read-only."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import base_model
import numpy as np
from case import Attempt, case

from fptq_onnx.quantization.plan import Plan

_SAME = "Output that is an input"
_DISK = "Output that cannot be written"


def _model(folder: Path, output: str, *, external: bool = False) -> Attempt:
    path = base_model.save(base_model.model(), folder / "model.onnx", external=external)
    return Attempt(path, folder / output)


@case(_SAME, "the model itself", "this is the file the model is read from")
def output_is_input(folder: Path) -> Attempt:
    return _model(folder, "model.onnx")


@case(_SAME, "the model by a detour", "this is the file the model is read from")
def output_by_a_detour(folder: Path) -> Attempt:
    (folder / "sub").mkdir()
    return _model(folder, "sub/../model.onnx")


@case(_SAME, "a symbolic link to the model", "this is the file the model is read from")
def output_links_to_input(folder: Path) -> Attempt:
    (folder / "out.onnx").symlink_to("model.onnx")
    return _model(folder, "out.onnx")


@case(_SAME, "a hard link to the model", "this is the file the model is read from")
def output_hard_link(folder: Path) -> Attempt:
    attempt = _model(folder, "out.onnx")
    os.link(attempt.model, folder / "out.onnx")
    return attempt


@case(_SAME, "the model's data file", "the model is read from")
def output_is_the_data(folder: Path) -> Attempt:
    return _model(folder, "model.onnx.data", external=True)


@case(_SAME, "a name whose data file would be the model's", "the model is read from")
def output_data_is_the_data(folder: Path) -> Attempt:
    attempt = _model(folder, "model", external=True)
    (folder / "model.data").symlink_to("model.onnx.data")
    return attempt


@case(
    _SAME,
    "`tokenizer.onnx`, whose report would replace tokenizer.json",
    "tokenizer.json: this is a file that the conversion reads",
)
def report_over_the_tokenizer(folder: Path) -> Attempt:
    (folder / "tokenizer.json").write_text("{}")
    return _model(folder, "tokenizer.onnx")


@case(
    _SAME,
    "`config.onnx`, whose report would replace the model's config.json",
    "the report of config.onnx would replace it, and it is no report",
)
def report_over_the_config(folder: Path) -> Attempt:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return _model(folder, "config.onnx")


@case(_SAME, "`out.json`, which is also the name of its report", "its report would have the same name")
def report_over_the_output(folder: Path) -> Attempt:
    return _model(folder, "out.json")


@case(_SAME, "an output whose report is the plan that is read", "this is a file that the conversion reads")
def report_over_the_plan(folder: Path) -> Attempt:
    attempt = _model(folder, "out.onnx")
    (folder / "out.json").write_text(Plan((), {}).to_json())
    attempt.options["plan"] = folder / "out.json"
    return attempt


@case(_SAME, "the recipe", "this is a file that the conversion reads")
def output_is_the_recipe(folder: Path) -> Attempt:
    attempt = _model(folder, "recipe.yaml")
    attempt.recipe = folder / "recipe.yaml"
    attempt.recipe.write_text("name: mine\n")
    return attempt


@case(_SAME, "the calibration data", "this is a file that the conversion reads")
def output_is_the_calibration(folder: Path) -> Attempt:
    attempt = _model(folder, "data.npz")
    attempt.options["calibration"] = folder / "data.npz"
    np.savez(folder / "data.npz", x=np.zeros((1, 8, 32), np.float32))
    return attempt


@case(_DISK, "a folder", "the output path is a folder")
def output_is_a_folder(folder: Path) -> Attempt:
    (folder / "out.onnx").mkdir()
    return _model(folder, "out.onnx")


@case(_DISK, "in a folder that does not exist", "its folder does not exist")
def output_in_no_folder(folder: Path) -> Attempt:
    return _model(folder, "nowhere/out.onnx")


@case(_DISK, "in a folder that is a file", "its folder does not exist")
def output_in_a_file(folder: Path) -> Attempt:
    (folder / "file").write_bytes(b"")
    return _model(folder, "file/out.onnx")


@case(_DISK, "a name of 300 letters", "cannot be written: File name too long")
def long_output(folder: Path) -> Attempt:
    return _model(folder, "o" * 300 + ".onnx")


@case(_DISK, "a link to itself", "cannot be written: Too many levels of symbolic links")
def output_links_to_itself(folder: Path) -> Attempt:
    (folder / "out.onnx").symlink_to("out.onnx")
    return _model(folder, "out.onnx")


@case(_DISK, "a folder that is read-only", "cannot be written: ")
def read_only_folder(folder: Path) -> Attempt:
    (folder / "locked").mkdir()
    attempt = _model(folder, "locked/out.onnx")
    attempt.around = lambda: _unprivileged(folder / "locked")
    return attempt


@case(_DISK, "the same for a dry run, which writes the plan", "cannot be written: ")
def read_only_folder_for_the_plan(folder: Path) -> Attempt:
    attempt = read_only_folder(folder)
    attempt.options["dry_run"] = True
    return attempt


@contextlib.contextmanager
def _unprivileged(locked: Path) -> Iterator[None]:
    """Make a folder read-only, for root too: as another user, who may read everything else here."""
    mine = os.geteuid()
    parents = [parent for parent in locked.parents if parent.stat().st_mode & 0o005 != 0o005]
    modes = {path: path.stat().st_mode for path in (*parents, locked)}
    for parent in parents if mine == 0 else ():
        parent.chmod(modes[parent] | 0o055)
    locked.chmod(0o555)
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if mine == 0:
            os.seteuid(mine)
        for path, mode in modes.items():
            path.chmod(mode)


@contextlib.contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes of any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full_disk(folder: Path, size: int, *, external: bool = False) -> Attempt:
    attempt = _model(folder, "out.onnx", external=external)
    attempt.around = lambda: _files_no_larger_than(size)
    return attempt


@case(_DISK, "on a disk with no room at all", "cannot be written: ")
def full_disk(folder: Path) -> Attempt:
    return _full_disk(folder, 0)


@case(_DISK, "on a disk with room for half of the model", "cannot be written: ")
def nearly_full_disk(folder: Path) -> Attempt:
    return _full_disk(folder, 8192)


@case(_DISK, "on a disk with room for half of the model's data file", "cannot be written: ")
def nearly_full_disk_for_data(folder: Path) -> Attempt:
    return _full_disk(folder, 8192, external=True)


@case(_DISK, "on a disk with no room for the plan of a dry run", "cannot be written: ")
def full_disk_for_the_plan(folder: Path) -> Attempt:
    attempt = _full_disk(folder, 100)
    attempt.options["dry_run"] = True
    return attempt
