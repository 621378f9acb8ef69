"""Runs of a chain of layers that the tests of the operators in sessions share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from gpu_bench.problem import Shape, random_activations
from gpu_bench.sessions import BoundRun

CHAIN = (Shape(1024, 1536), Shape(1536, 1024))


def buffers(rows, generator):
    """Random activations of the chain, and poisoned memory for its results."""
    x = random_activations(rows, CHAIN[0].k, torch.float16, generator)
    return x, torch.full((rows, CHAIN[-1].n), float("nan"), dtype=torch.float16, device="cuda")


def run_once(session, x, graph_id=None):
    """The results of one run on poisoned memory."""
    y = torch.full((x.shape[0], CHAIN[-1].n), float("nan"), dtype=torch.float16, device="cuda")
    BoundRun(session, {"X": x}, {"Y": y}, graph_id)()
    torch.cuda.synchronize()  # a session on the caller's stream need not have waited
    assert torch.isfinite(y).all()
    return y


def check_at_once(sessions, inputs, expected):
    """Run every input on a thread of its own, the sessions in turn; an error in a thread is one here."""
    start = threading.Barrier(len(inputs))

    def work(index):
        start.wait()
        results = [run_once(sessions[index % len(sessions)], inputs[index]) for _ in range(25)]
        return [torch.equal(result, expected[index]) for result in results]

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(all(equal) for equal in pool.map(work, range(len(inputs))))


def check_callers_stream(stream, session, plain, rows, generator):
    """Check that on the caller's `stream`, which `session` runs on, work around a run is ordered by the stream alone.

    Args:
        stream: The torch stream that `session` was created with.
        session: Under test.
        plain: A session on a stream of its own, for the results expected.
        rows: Of the activations.
        generator: Source of the activations.
    """
    x, y = buffers(rows, generator)
    run = BoundRun(session, {"X": x}, {"Y": y})
    run()
    for _ in range(5):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            x.mul_(0.5).add_(torch.randn_like(x))
        run()
        with torch.cuda.stream(stream):
            copy = y.clone()
        stream.synchronize()
        assert torch.equal(copy, run_once(plain, x))
