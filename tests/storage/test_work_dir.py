"""Records appear whole or not at all; a directory of something else, of another job or in use is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fptq_onnx.errors import WorkDirError
from fptq_onnx.quantization.int4 import QuantizedWeight
from fptq_onnx.quantization.packing import pack_int4, unpack_int4
from fptq_onnx.storage.states import States
from fptq_onnx.storage.weights import StoredWeights
from fptq_onnx.storage.work_dir import WorkDir
from fptq_onnx.storage.workspace import workspace

JOB = {"the model": "abc", "the recipe": "paper"}


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        arrays.arrays(
            st.sampled_from(["f4", "f2", "i8", "u1", "i1", "f8", "?"]), arrays.array_shapes(min_dims=0, min_side=0)
        ),
        max_size=4,
    )
)
def test_records_come_back_bit_for_bit(record: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder, WorkDir(Path(folder) / "w", JOB) as work:
        work.save("a", record, {"note": [1, "x"]})
        found, notes = work.load("a")
        assert notes == {"note": [1, "x"]} and found.keys() == record.keys()
        for name, array in record.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


def test_bfloat16(tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    with WorkDir(tmp_path / "w", JOB) as work:
        work.save("a", {"x": array, "t": array.T})
        assert work.read("a", "x").dtype == array.dtype
        np.testing.assert_array_equal(work.read("a", "t"), array.T)


@given(st.lists(st.integers(-8, 7), max_size=9), st.booleans())
def test_int4_packing(values: list[int], column: bool) -> None:
    q = np.array(values, np.int8).reshape((-1, 1) if column else (1, -1))
    packed = pack_int4(q)
    assert packed.dtype == np.uint8 and packed.size == -(-q.size // 2)
    np.testing.assert_array_equal(unpack_int4(packed, q.shape), q)


def test_goes_on_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    with WorkDir(path, JOB) as work:
        work.save("done", {"x": np.zeros(3)})
        (path / "half.safetensors.partial").write_bytes(b"cut off")
    with WorkDir(path, JOB) as work:
        assert work.names("") == ["done"] and work.has("done") and not work.has("half")
        assert not list(path.glob("*.partial"))
        work.remove()
    assert not path.exists()


def test_another_job_is_refused_by_name(tmp_path: Path) -> None:
    WorkDir(tmp_path / "w", JOB).close()
    with pytest.raises(WorkDirError, match=r"belongs to another conversion: the recipe changed since it was begun"):
        WorkDir(tmp_path / "w", JOB | {"the recipe": "balanced"})
    with pytest.raises(WorkDirError, match="the format changed"):
        WorkDir(tmp_path / "w", JOB | {"the format": "qdq"})
    (tmp_path / "w" / "fingerprint.json").write_text("{")
    with pytest.raises(WorkDirError, match="damaged"):
        WorkDir(tmp_path / "w", JOB)


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(WorkDirError, match=r"holds files of something else \(thesis.tex\)"):
        WorkDir(tmp_path, JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(WorkDirError, match="cannot be written"):
        WorkDir(tmp_path / "thesis.tex", JOB)


def test_interrupted_before_its_first_file(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    (tmp_path / "fingerprint.json.partial").write_text("{")
    with WorkDir(tmp_path, JOB):
        assert json.loads((tmp_path / "fingerprint.json").read_text()) == JOB


def test_damaged_record(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "w", JOB) as work:
        (tmp_path / "w" / "a.safetensors").write_bytes(b"\x00" * 40)
        with pytest.raises(WorkDirError, match=r"a\.safetensors: is damaged"):
            work.load("a")


_HOLD = """
import sys, time
from fptq_onnx.storage.work_dir import WorkDir
work = WorkDir(sys.argv[1], {"the model": "abc", "the recipe": "paper"})
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_even_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / ".out.onnx.work-1"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(WorkDirError, match="is in use by another process"):
            WorkDir(folder, JOB)
        WorkDir.clear_abandoned(tmp_path, ".out.onnx.work-")
        assert folder.exists()
    finally:
        holder.kill()
        holder.communicate()
    WorkDir(folder, JOB).close()
    WorkDir.clear_abandoned(tmp_path, ".out.onnx.work-")
    assert not folder.exists()


def test_states_in_memory_and_on_disk(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "w", JOB) as work:
        for states in (States(None, "a"), States(work, "a")):
            for batch in (1, 2):
                states.put(3, batch, {"h/0": np.full((2, batch), batch, np.float16)})
            states.drop(2)
            found = states.get(3, 2)
            assert found["h/0"].dtype == np.float16 and found["h/0"].tolist() == [[2, 2], [2, 2]]
            states.drop(3)
            with pytest.raises((KeyError, WorkDirError)):
                states.get(3, 1)
        assert work.names("") == []


def test_stored_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: QuantizedWeight(rng.integers(-8, 8, (5, 3)).astype(np.int8), rng.normal(size=(2, 3)).astype(dtype), 4, 15)
        for name, dtype in (("a", np.float32), ("b", ml_dtypes.bfloat16))
    }
    also, notes = {"also.x/y": np.arange(3)}, {"a": ["gptq", "why"]}
    with WorkDir(tmp_path / "w", JOB) as work:
        StoredWeights(work).put("block", weights, also, notes)
        again = StoredWeights(work)
        assert again.restore("other") is None
        arrays, found_notes = again.restore("block") or ({}, {})
        assert found_notes == notes and arrays.keys() == also.keys()
        memory = StoredWeights(None)
        memory.put("block", weights, also, notes)
        for name, weight in weights.items():
            for found in (again.get(name), memory.get(name)):
                np.testing.assert_array_equal(found.q, weight.q)
                np.testing.assert_array_equal(found.scale, weight.scale)
                assert (found.block_size, found.scale_max_multiple) == (4, 15)
                assert found.scale.dtype == weight.scale.dtype


def test_workspaces(tmp_path: Path) -> None:
    target = tmp_path / "[odd]out.onnx"
    with workspace(None, target, dict, wanted=False) as nothing:
        assert nothing is None
    with pytest.raises(ValueError, match="boom"), workspace(None, target, dict, wanted=True) as temporary:
        assert temporary is not None and temporary.path.parent == tmp_path
        temporary.save("a", {"x": np.zeros(2)})
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="boom"), workspace(tmp_path / "w", target, lambda: JOB, wanted=True) as given:
        assert given is not None
        given.save("a", {"x": np.zeros(2)})
        raise ValueError("boom")
    with workspace(tmp_path / "w", target, lambda: JOB, wanted=False) as given:
        assert given is not None and given.has("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed_after", range(4))
def test_a_removal_that_was_killed_is_finished(killed_after: int, tmp_path: Path) -> None:
    """Whatever is left of finished work is not taken for work to go on with."""
    folder = tmp_path / "work"
    with WorkDir(folder, {"model": "a"}) as work:
        for name in ("one", "two", "three"):
            work.save(name, {"x": np.arange(3)})
        (folder / "clearing").touch()
        for file in sorted(folder.glob("*.safetensors"))[:killed_after]:
            file.unlink()
    with WorkDir(folder, {"model": "b"}) as work:  # what the old job was does not matter any more
        assert work.names("") == [] and not (folder / "clearing").exists()
        work.save("one", {"x": np.arange(3)})
        work.remove()
    assert not folder.exists()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    """Ours, and the file that safetensors writes before it takes the name it was given."""
    folder = tmp_path / "work"
    with WorkDir(folder, {}):
        for name in ("one.safetensors.partial", ".tmpXyZ123"):
            (folder / name).write_bytes(b"half")
    with WorkDir(folder, {}) as work:
        assert not {path.name for path in folder.iterdir()} & {"one.safetensors.partial", ".tmpXyZ123"}
        (folder / ".tmpXyZ124").write_bytes(b"half")
        work.remove()
    assert not folder.exists()
