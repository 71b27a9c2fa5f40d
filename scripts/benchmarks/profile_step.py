#!/usr/bin/env python3
"""Prints where a training step in GPT-NeoX spends time and memory: kernels, gaps, launches, stages.

    python scripts/benchmarks/profile_step.py                  # metala_380m.yml, 8 x 2,048
    python scripts/benchmarks/profile_step.py --micro-batch 1 --kernels 40
    python scripts/benchmarks/profile_step.py --gpus 2         # one of two data-parallel ranks

needs a linked GPT-NeoX checkout, as benchmark_training.py does. It trains on random tokens and
reads the trace that torch.profiler writes of a few steps, of the GPU alone. Memory is that of the
first five steps, of which the fourth captures CUDA graphs, and of the parts of a later one.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmark_training import LEVELS, ONE_GPU, ROOT, measure, training_settings, write_data

from convert.command import need_neox
from megatron_patch.commands.command_line import Parser, existing_file, one_of, run_script, whole

FIRST, STEPS = 8, 3  # profiled iterations
# GPT-NeoX's own `profile` setting records Python's stack too, which slows the host down tenfold.
PROGRAM = """
import json, os, runpy, sys, torch
sys.path.insert(0, "{checkout}")
from megatron import training
step, calls, stages = training.train_step, 0, []
profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
def note(stage):
    cuda = torch.cuda
    peaks = cuda.max_memory_allocated(), cuda.max_memory_reserved()
    stages.append([stage, cuda.memory_allocated(), *peaks])
    cuda.reset_peak_memory_stats()
def noting(name):
    part = getattr(training, name)
    def run(*args, **kwargs):
        result = part(*args, **kwargs)
        if calls == {first} - 1:
            note(name)
        return result
    setattr(training, name, run)
def profiled(*args, **kwargs):
    global calls
    calls += 1
    if calls == 1:
        note("before training")
    if calls == {first}:
        torch.cuda.synchronize()
        profiler.start()
    if calls == {first} - 1:
        note("steps before")
    result = step(*args, **kwargs)
    if calls <= 5:
        note(f"step {{calls}}")
    if calls == {first} - 1:
        note("optimizer")
        with open("{stages}", "w") as file:
            json.dump(stages, file)
    if calls == {last}:
        torch.cuda.synchronize()
        profiler.stop()
        profiler.export_chrome_trace("{trace}")
    return result
if os.environ["RANK"] == "0":
    training.train_step = profiled
    noting("forward_step")
    noting("backward_step")
runpy.run_path("{checkout}/train.py", run_name="__main__")
"""
# Which part of a step a kernel belongs to: the first pattern that its name matches.
PARTS = {
    "communication": r"nccl",
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitK",
    "operator": r"chunk|carry|factors|^output|gradients|exact|states|prepare",
    "convolution": r"conv",
    "SwiGLU": r"swiglu|silu",
    "norms": r"rms_?norm|RMSNorm|layer_norm|LayerNorm",
    "loss": r"cross_entropy|softmax|vocab",
    "Adam": r"adam|Adam",
    "norm of the gradients": r"lpnorm|NormOps|norm_",
    "copies and fills": r"Memcpy|Memset|copy|fill|Fill|CatArray",
    "elementwise": r"elementwise|reduce",
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=existing_file, default=ROOT / "configs/metala_380m.yml")
    parser.add_argument("--gpus", type=whole(1), default=1, help="of this machine (default: 1)")
    parser.add_argument("--micro-batch", type=whole(1), help="sequences (default: as in --config)")
    parser.add_argument("--kernels", type=whole(0), default=25, help="how many to list")
    parser.add_argument("--recompute", type=one_of(LEVELS), help="(default: as in --config)")
    options = parser.parse_args(argv)
    vars(options).update({**ONE_GPU, "gpus": options.gpus, "length": None})
    options.steps = FIRST + STEPS + 12
    with tempfile.TemporaryDirectory() as work:
        checkout, trace = need_neox(), Path(work) / "trace.json"
        stages = Path(work) / "stages.json"
        program = Path(work) / "train.py"
        last = FIRST + STEPS - 1
        places = dict(checkout=checkout, trace=trace, stages=stages)
        program.write_text(PROGRAM.format(**places, first=FIRST, last=last))
        settings = {**training_settings(options), **write_data(Path(work))}
        if options.recompute:
            settings["metala"]["recompute"] = options.recompute
        measure(checkout, settings, Path(work), "profile", program)
        report_memory(json.loads(stages.read_text()))
        report(json.loads(trace.read_text())["traceEvents"], options.kernels)


def report_memory(stages: list[tuple[str, int, int, int]]) -> None:
    """Prints what is allocated at the end of each stage, and the largest amounts within it."""
    print(f"{'GB after':<26}{'allocated':>10}{'at most':>10}{'reserved at most':>18}")
    for stage, *amounts in stages:
        allocated, most, reserved = (amount / 1e9 for amount in amounts)
        print(f"{stage:<26}{allocated:>10.2f}{most:>10.2f}{reserved:>18.2f}")
    print()


def report(events: list[dict], listed: int) -> None:
    """Prints the tables from a Chrome trace's events; times are microseconds there."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    on_gpu = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: e["ts"])
    launches = defaultdict(int)
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            if re.search(r"Launch|Memcpy|Memset|Synchronize", event["name"]):
                launches[event["name"]] += 1
    parts, kernels = defaultdict(lambda: [0.0, 0]), defaultdict(lambda: [0.0, 0])
    for event in on_gpu:
        part = next((p for p, names in PARTS.items() if re.search(names, event["name"])), "other")
        for sums, key in ((parts, part), (kernels, (part, event["name"]))):
            sums[key][0] += event["dur"] / STEPS / 1e3
            sums[key][1] += 1
    # Communication on a stream of its own is no work of the GPU's: beside it the GPU may wait.
    busy, end, last = 0.0, on_gpu[0]["ts"], "start"
    gaps = defaultdict(lambda: [0.0, 0])
    for event in on_gpu:
        if re.search(PARTS["communication"], event["name"]):
            continue
        idle = max(0.0, event["ts"] - end)
        pair = "short" if idle < 20 else f"{last[:60]} | {event['name'][:60]}"
        gaps[pair][0] += idle / STEPS / 1e3
        gaps[pair][1] += idle > 0
        last = event["name"]
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
        end = max(end, event["ts"] + event["dur"])
    span = end - on_gpu[0]["ts"]
    print(
        f"a step: GPU works {busy / STEPS / 1e3:.1f} ms of {span / STEPS / 1e3:.1f} (profiled), "
        f"{len(on_gpu) / STEPS:,.0f} kernels, the host's calls "
        + ", ".join(f"{name} {n / STEPS:,.0f}" for name, n in sorted(launches.items()))
    )
    print(f"\n{'the GPU waits between':<126}{'ms':>8}{'times':>9}")
    for pair, (time, count) in sorted(gaps.items(), key=lambda x: -x[1][0])[:listed]:
        print(f"{pair:<126}{time:>8.2f}{count / STEPS:>9.0f}")
    print(f"\n{'part':<26}{'ms':>8}{'kernels':>9}")
    for part, (time, count) in sorted(parts.items(), key=lambda x: -x[1][0]):
        print(f"{part:<26}{time:>8.2f}{count / STEPS:>9.0f}")
    print(f"\n{'kernel':<90}{'ms':>8}{'kernels':>9}")
    for (part, name), (time, count) in sorted(kernels.items(), key=lambda x: -x[1][0])[:listed]:
        print(f"{part[:12] + ': ' + name[:74]:<90}{time:>8.2f}{count / STEPS:>9.0f}")


if __name__ == "__main__":
    run_script(main)
