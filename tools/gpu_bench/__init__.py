"""The parts of tools/bench_gpu.py: problems, peers, timing and records."""
