"""Opens and runs a session in a process of its own, which a broken library may take down.

Run as a script with a JSON object of `Probe`'s fields as its argument; imports nothing of this package.
"""

from __future__ import annotations

__all__ = ["Probe", "ProbeResult", "run_probe"]

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 600


@dataclass(frozen=True)
class Probe:
    """What to try.

    Attributes:
        providers: Execution providers in order.
        library: Op library to register; None for none.
        model: ONNX file; None to stop after the registration.
        feeds: .npz file of inputs to run the model on; None to stop after opening it.
    """

    providers: tuple[str, ...]
    library: str | None = None
    model: str | None = None
    feeds: str | None = None


@dataclass(frozen=True)
class ProbeResult:
    """What happened.

    Attributes:
        stage: The last stage that was begun: "import", "register", "open", "run" or "done".
        error: Message of the exception that ended it, or how the process died; None if nothing failed.
        log: What onnxruntime wrote to stderr.
        providers: Providers of the session that was opened.
        nodes: Nodes that ran, by provider.
        finite: Whether all floating outputs are finite.
    """

    stage: str
    error: str | None
    log: str
    providers: tuple[str, ...] = ()
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)
    finite: bool = True


def run_probe(probe: Probe) -> ProbeResult:
    """Run a probe in a new interpreter of this environment."""
    with tempfile.TemporaryDirectory(prefix="fptq-onnx-") as folder:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", __file__, json.dumps(dataclasses.asdict(probe))]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return ProbeResult("run", f"it did not end within {_SECONDS} s", "")
    lines = done.stdout.splitlines()
    stages = [line.removeprefix("stage ") for line in lines if line.startswith("stage ")]
    if lines and lines[-1].startswith("{"):
        return ProbeResult(**json.loads(lines[-1]), log=done.stderr)
    code = done.returncode
    died = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return ProbeResult(stages[-1] if stages else "import", f"the process was ended {died}", done.stderr)


def _main() -> None:
    asked = json.loads(sys.argv[1])
    result: dict[str, object] = {}
    stage = "import"

    def begin(name: str) -> None:
        nonlocal stage
        stage = name
        print(f"stage {name}", flush=True)

    try:
        begin("import")
        import onnxruntime

        begin("register")
        options = onnxruntime.SessionOptions()
        if asked["library"] is not None:
            options.register_custom_ops_library(asked["library"])
        if asked["model"] is not None:
            begin("open")
            options.enable_profiling = asked["feeds"] is not None
            options.profile_file_prefix = "profile"
            session = onnxruntime.InferenceSession(asked["model"], options, providers=asked["providers"])
            result["providers"] = session.get_providers()
            if asked["feeds"] is not None:
                begin("run")
                result |= _run(session, asked["feeds"])
        begin("done")
        error = None
    except Exception as caught:  # whatever it is, it is the answer
        error = f"{caught}" or type(caught).__name__
    print(json.dumps({"stage": stage, "error": error, **result}), flush=True)


def _run(session: object, feeds: str) -> dict[str, object]:
    import numpy as np

    with np.load(feeds) as arrays:
        outputs = session.run(None, dict(arrays))  # type: ignore[attr-defined]
    finite = all(
        np.isfinite(array).all() for array in outputs if getattr(array, "dtype", None) and array.dtype.kind == "f"
    )
    events = json.loads(Path(session.end_profiling()).read_text())  # type: ignore[attr-defined]
    nodes: dict[str, int] = {}
    for event in events:
        if event["name"].endswith("_kernel_time"):
            provider = event["args"].get("provider", "")
            nodes[provider] = nodes.get(provider, 0) + 1
    return {"finite": bool(finite), "nodes": nodes}


if __name__ == "__main__":
    _main()
