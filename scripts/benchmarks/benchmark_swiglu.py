"""Times SwiGLU on a GPU, by our kernels and by PyTorch.

    python scripts/benchmarks/benchmark_swiglu.py

Times are of a replayed CUDA graph, medians with a cold cache, bfloat16. The floor (roofline) is the
time to read each input once and write each output once at the copy bandwidth of this run. "kept" is
the memory that the backward pass needs beside input and output.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import copy_bandwidth, graph_ms, passes

from megatron_patch.commands.command_line import Parser, need_gpu, run_script
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
    print(f"{'':<20}{'forward':>9}{'floors':>8}{'fwd+bwd':>9}{'floors':>8}{'kept MiB':>10}")
    for width in WIDTHS:
        x = torch.randn(TOKENS, 2 * width, device="cuda").bfloat16().requires_grad_()
        d_y = torch.randn(TOKENS, width, device="cuda").bfloat16()
        half = 2 * TOKENS * width  # bytes of gate, up or y
        floors = 3 * half / speed, 8 * half / speed
        found = {}
        for backend in ("triton", "torch"):
            forward, both = passes(partial(swiglu, x, backend=backend), [x], d_y)
            times = found[backend] = graph_ms(forward), graph_ms(both)
            ratios = [time / floor for time, floor in zip(times, floors, strict=True)]
            print(
                f"{f'F {width}, {backend}':<20}{times[0]:>9.3f}{ratios[0]:>8.2f}"
                f"{times[1]:>9.3f}{ratios[1]:>8.2f}{kept_bytes(x, backend) / 2**20:>10.0f}"
            )
        ratios = [a / b for a, b in zip(found["torch"], found["triton"], strict=True)]
        print(f"{'ratio':<20}{ratios[0]:>9.2f}{ratios[1]:>17.2f}", flush=True)


def main() -> None:
    Parser(description=__doc__.split("\n")[0]).parse_args()
    need_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    time_all()


if __name__ == "__main__":
    run_script(main)
