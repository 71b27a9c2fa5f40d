"""The tables that profile_step.py makes of a trace. Training with a profiler needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

import profile_step


def event(name: str, start: float, duration: float, kind: str = "kernel") -> dict:
    return {"name": name, "cat": kind, "ts": start, "dur": duration}


def test_work_and_gaps_of_a_trace(capsys):
    """Microseconds of three steps: what waits beside communication alone is a gap."""
    events = [
        event("nvjet_product", 0, 3000),
        event("ncclDevKernel_AllReduce", 1000, 8000),
        event("Memcpy DtoH", 6000, 3000, "gpu_memcpy"),
        event("cudaLaunchKernel", 0, 5, "cuda_runtime"),
        event("cudaStreamSynchronize", 5, 5, "cuda_runtime"),
    ]
    profile_step.report(events, listed=5)
    printed = capsys.readouterr().out
    assert "GPU works 2.0 ms of 3.0" in printed
    assert "cudaLaunchKernel 0, cudaStreamSynchronize 0" in printed
    rows = {line[:126].strip(): line[126:].split() for line in printed.splitlines()}
    assert rows["nvjet_product | Memcpy DtoH"] == ["1.00", "0"]
    parts = {line[:26].strip(): line[26:].split() for line in printed.splitlines()}
    assert parts["matrix products"][0] == "1.00"
    assert parts["communication"][0] == "2.67"
    assert parts["copies and fills"][0] == "1.00"


def test_memory_by_stage(capsys):
    profile_step.report_memory([["step 1", 1_000_000_000, 2_500_000_000, 3_000_000_000]])
    assert capsys.readouterr().out.splitlines()[1].split() == ["step", "1", "1.00", "2.50", "3.00"]


def test_the_profiled_program_is_one():
    places = dict(checkout="/neox", trace="/trace", stages="/stages", first=8, last=10)
    compile(profile_step.PROGRAM.format(**places), "train.py", "exec")
