"""Outputs appear whole or not at all, and what a killed process left is cleared away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_onnx.errors import ModelError
from fptq_onnx.graph.output_files import refuse_overwriting, staged, write_text

NAMES = ("out.onnx", "out.onnx.data", "out.json")


def _listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@settings(max_examples=60, deadline=None)
@given(
    old=st.sets(st.sampled_from(NAMES)),
    new=st.sets(st.sampled_from(NAMES[1:])),
    fails_at=st.sampled_from(["writing", "nothing"]),
)
def test_all_or_nothing(tmp_path_factory: pytest.TempPathFactory, old: set[str], new: set[str], fails_at: str) -> None:
    """Whatever lay there: after a failure it lies there still, after success the new files do, and nothing more."""
    folder = tmp_path_factory.mktemp("staged")
    for name in old:
        (folder / name).write_text("old")
    before = _listing(folder)

    def write() -> None:
        with staged(folder / "out.onnx") as staging:
            for name in new:
                (staging.folder / name).write_text("new")
            if fails_at == "writing":
                raise KeyboardInterrupt
            staging.path.write_text("new")
            staging.publish()

    if fails_at == "writing":
        with pytest.raises(KeyboardInterrupt):
            write()
        assert _listing(folder) == before
    else:
        write()
        assert _listing(folder) == before | dict.fromkeys({*new, "out.onnx"}, "new")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from fptq_onnx.graph.output_files import staged\n"
        "with staged(pathlib.Path(sys.argv[1])) as staging:\n"
        "    staging.path.write_text('half'); print('ready', flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out.onnx"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (folder,) = tmp_path.iterdir()
    write_text(tmp_path / "out.onnx", "mine")
    assert folder.is_dir(), "it is in use"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.is_dir(), "nobody can tidy up after SIGKILL"
    write_text(tmp_path / "other.onnx", "another output")
    assert folder.is_dir()
    write_text(tmp_path / "out.onnx", "whole")
    assert _listing(tmp_path) == {"out.onnx": "whole", "other.onnx": "another output"}


def test_a_companion_that_is_a_folder_stops_it_before_anything_moved(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_text("old")
    (tmp_path / "out.onnx.data").mkdir()
    with staged(tmp_path / "out.onnx") as staging:
        staging.path.write_text("new")
        (staging.folder / "out.onnx.data").write_text("new")
        with pytest.raises(ModelError, match=r"out.onnx: cannot be written: .*out.onnx.data is a folder"):
            staging.publish()
    assert (tmp_path / "out.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["same", "./same", "symbolic", "hard"])
def test_inputs_are_recognized_by_every_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "same").write_text("")
    (tmp_path / "symbolic").symlink_to("same")
    os.link(tmp_path / "same", tmp_path / "hard")
    with pytest.raises(ModelError, match="the model is read from"):
        refuse_overwriting([tmp_path / "new", tmp_path / name], [tmp_path / "absent", tmp_path / "same"])
    refuse_overwriting([tmp_path / "new"], [tmp_path / "same"])
