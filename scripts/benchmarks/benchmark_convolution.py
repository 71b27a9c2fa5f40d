"""Times the short convolution on a GPU, by our kernels and by others.

    python scripts/benchmarks/benchmark_convolution.py

Times are of a replayed CUDA graph, medians with a cold cache, bfloat16, W = 4, with SiLU. The floor
(roofline) is the time to read each input once and write each output once at the copy bandwidth of
this run.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from timing import HEADER, copy_bandwidth, run_benchmark, time_passes

from megatron_patch.commands.command_line import run_script
from megatron_patch.ops import short_convolution

BATCH, TIME = 16, 2048


def time_all() -> None:
    speed = copy_bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; times in ms, {BATCH} x {TIME} tokens")
    print(HEADER)
    backends = ["triton", "torch"] + ["causal_conv1d"] * (find_spec("causal_conv1d") is not None)
    for channels in (1024, 2048):
        tensor = 2 * BATCH * TIME * channels  # bytes of x or y
        floors = 2 * tensor / speed, 5 * tensor / speed
        for time_major in (False, True):
            shape = (TIME, BATCH, channels) if time_major else (BATCH, TIME, channels)
            x = torch.randn(shape, device="cuda").bfloat16()
            x = x.transpose(0, 1) if time_major else x
            weight = torch.randn(channels, 1, 4, device="cuda").bfloat16()
            leaves = [x.requires_grad_(), weight.requires_grad_()]
            gradient = torch.randn_like(x)
            for backend in backends:
                operator = partial(short_convolution, *leaves, backend=backend)
                layout = "time-major" if time_major else "batch-major"
                name = f"d {channels}, {layout}, {backend}"
                line = time_passes(name, lambda call=operator: call()[0], leaves, gradient, floors)[
                    1
                ]
                print(line, flush=True)


if __name__ == "__main__":
    run_script(partial(run_benchmark, __doc__.split("\n")[0], time_all))
