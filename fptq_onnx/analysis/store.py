"""Everything measured so far, on disk: an analysis that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_onnx.analysis.experiments import Experiment, Measurement

__all__ = ["Store", "digest"]

Array = npt.NDArray[Any]


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits of the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """A folder that belongs to one fingerprint: measurements as lines of JSON, arrays as .npz files.

    Several processes may read it; only one records measurements. A line that was cut off by a crash is ignored.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder, which is created if it is missing."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "measurements.jsonl"
        self._measured: dict[str, Measurement] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._measured[entry["experiment"]] = Measurement(**entry["measurement"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue

    def __len__(self) -> int:
        """Number of measurements."""
        return len(self._measured)

    def get(self, experiment: Experiment) -> Measurement | None:
        """The measurement of an experiment, None if it was never made."""
        return self._measured.get(experiment.key)

    def record(self, experiment: Experiment, measurement: Measurement) -> None:
        """Keep a measurement, on disk when this returns."""
        self._measured[experiment.key] = measurement
        entry = {"experiment": experiment.key, "measurement": dataclasses.asdict(measurement)}
        fresh_line = "\n" if self._path.is_file() and not self._path.read_bytes().endswith(b"\n") else ""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(fresh_line + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def load_arrays(self, name: str) -> dict[str, Array] | None:
        """Arrays stored under a name, None if there are none."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def save_arrays(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Store arrays; the file appears whole or not at all, so that processes may store the same at once."""
        handle, temporary = tempfile.mkstemp(suffix=".npz", prefix=".writing-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **dict(arrays))  # type: ignore[arg-type]
            os.replace(temporary, self.folder / f"{name}.npz")
        finally:
            Path(temporary).unlink(missing_ok=True)

    def load_json(self, name: str) -> Any:
        """What `save_json` stored under a name, None if there is nothing."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save_json(self, name: str, value: Any) -> None:
        """Store a JSON value under a name, whole or not at all."""
        temporary = self.folder / f".writing-{name}.json"
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(self.folder / f"{name}.json")
