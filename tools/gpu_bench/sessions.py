"""onnxruntime sessions on CUDA with fixed buffers and CUDA graphs, and what they place where."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnxruntime as ort
import torch
from onnx import TensorProto

__all__ = ["ELEMENT_TYPES", "BoundRun", "RunTimer", "cuda_session", "environment_variable", "op_library", "placement"]

logger = logging.getLogger(__name__)

ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
}
WARM_UP_RUNS = 4
MIN_SAMPLE_SECONDS = 0.02


def op_library() -> str:
    """Path of the built operator library.

    Raises:
        fptq_onnx.errors.RuntimeUnavailableError: It was not built.
    """
    from fptq_onnx.ops.library import get_library_path

    return str(get_library_path())


@contextlib.contextmanager
def environment_variable(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for a while; None leaves it alone."""
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def cuda_session(
    model: Path | bytes,
    *,
    graph: bool = False,
    library: str | None = None,
    provider_options: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Create a session on CUDAExecutionProvider.

    Args:
        model: File or serialized model.
        graph: Capture runs into CUDA graphs.
        library: Operator library to register.
        provider_options: Further options of the CUDA provider.
        config: Session config entries.
        profile: Begin of the file name that `end_profiling` writes; None for no profile.

    Raises:
        RuntimeError: onnxruntime silently fell back to the CPU provider.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if library is not None:
        options.register_custom_ops_library(library)
    cuda = {"device_id": "0", "enable_cuda_graph": "1" if graph else "0", **(provider_options or {})}
    source = model if isinstance(model, bytes) else str(model)
    providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    session = ort.InferenceSession(source, options, providers=providers)
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("onnxruntime could not use CUDAExecutionProvider; are the CUDA and cuDNN libraries found?")
    return session


class BoundRun:
    """Runs of one session on fixed torch buffers; a graph session captures each `graph_id` once, then replays it."""

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        graph_id: int | None = None,
    ) -> None:
        """Bind the buffers; tensors on the CPU are bound as CPU inputs.

        Args:
            session: The session.
            inputs: Contiguous tensors by input name.
            outputs: Contiguous tensors by output name.
            graph_id: Which captured graph the runs belong to; None where the session captures none.
        """
        self._session = session
        self._keep = (dict(inputs), dict(outputs))
        self._binding = session.io_binding()
        for name, tensor in inputs.items():
            self._binding.bind_input(name, *self._place(tensor))
        for name, tensor in outputs.items():
            self._binding.bind_output(name, *self._place(tensor))
        self._options = ort.RunOptions()
        if graph_id is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        torch.cuda.synchronize()

    @staticmethod
    def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
        if not tensor.is_contiguous():
            raise ValueError("a bound tensor must be contiguous")
        kind, index = tensor.device.type, tensor.device.index or 0
        return kind, index, int(ELEMENT_TYPES[tensor.dtype]), list(tensor.shape), tensor.data_ptr()

    def __call__(self) -> None:
        """Run once and wait for the result."""
        self._session.run_with_iobinding(self._binding, self._options)

    def timer(self) -> RunTimer:
        """A timer for `timing.interleave`, warmed up (and captured)."""
        for _ in range(WARM_UP_RUNS):
            self()
        return RunTimer(self)


class RunTimer:
    """Wall-clock microseconds per run, host side included, as a caller of onnxruntime sees them."""

    def __init__(self, run: BoundRun) -> None:
        """Choose how many runs make one sample."""
        self._run = run
        self._repeats = 3
        self._repeats = max(3, round(MIN_SAMPLE_SECONDS * 1e6 / self()))

    def __call__(self) -> float:
        """Run one sample."""
        begin = time.perf_counter()
        for _ in range(self._repeats):
            self._run()
        return (time.perf_counter() - begin) * 1e6 / self._repeats


def placement(session: ort.InferenceSession) -> list[tuple[str, str]]:
    """(operator type, provider) of every node of the optimized graph.

    The session must have been created with config "session.record_ep_graph_assignment_info" = "1".
    """
    placed = []
    for subgraph in session.get_provider_graph_assignment_info():
        placed.extend((node.op_type, subgraph.ep_name) for node in subgraph.get_nodes())
    return placed
