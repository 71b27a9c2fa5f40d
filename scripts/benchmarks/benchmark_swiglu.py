"""Times SwiGLU on a GPU, by our kernels and by PyTorch.

    python scripts/benchmarks/benchmark_swiglu.py

Times are of a replayed CUDA graph, medians with a cold cache, bfloat16. The floor (roofline) is the
time to read each input once and write each output once at the copy bandwidth of this run. "kept" is
the memory that the backward pass needs beside input and output.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import HEADER, copy_bandwidth, run_benchmark, time_passes

from megatron_patch.commands.command_line import run_script
from megatron_patch.ops import swiglu

TOKENS = 16 * 2048
WIDTHS = (2816, 5632, 8192)  # F of the configurations of 0.38B, 1B and 3B


def kept_bytes(x: torch.Tensor, backend: str) -> int:
    """Returns the size of what the backward pass needs beside the input."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu(x, backend=backend)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def time_all() -> None:
    speed = copy_bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; times in ms, {TOKENS:,} tokens")
    print(f"{HEADER}{'kept MiB':>10}")
    for width in WIDTHS:
        x = torch.randn(TOKENS, 2 * width, device="cuda").bfloat16().requires_grad_()
        d_y = torch.randn(TOKENS, width, device="cuda").bfloat16()
        half = 2 * TOKENS * width  # bytes of gate, up or y
        floors = 3 * half / speed, 8 * half / speed
        found = {}
        for backend in ("triton", "torch"):
            call = partial(swiglu, x, backend=backend)
            found[backend], line = time_passes(f"F {width}, {backend}", call, [x], d_y, floors)
            print(f"{line}{kept_bytes(x, backend) / 2**20:>10.0f}")
        ratios = [a / b for a, b in zip(found["torch"], found["triton"], strict=True)]
        print(f"{'ratio':<36}{ratios[0]:>9.2f}{ratios[1]:>17.2f}", flush=True)


if __name__ == "__main__":
    run_script(partial(run_benchmark, __doc__.split("\n")[0], time_all))
