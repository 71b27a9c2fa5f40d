"""Times what the host does to launch one layer of MetaLA, forward and backward, on a GPU.

    python scripts/benchmarks/benchmark_launches.py
    python scripts/benchmarks/benchmark_launches.py --profile   and what the host does meanwhile

Medians in milliseconds over calls on 1 x 2,048 tokens in bfloat16. "host" is the time until the
call returns, "one thread" the same with PyTorch's backward pass in the calling thread instead of a
thread of its own (a model pays for that change of thread once a step), "launched" the time until
the GPU has finished, with a cold cache, and "graph" the GPU's part alone. The last row is an
autograd function that launches nothing.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import graph_ms, median_ms, mixer_inputs, passes

from megatron_patch.commands.command_line import Parser, need_gpu, run_script
from megatron_patch.ops import meta_linear_attention, short_convolution, swiglu

TOKENS, HEADS, K, V = 2048, 8, 64, 128
CALLS = 200


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16().requires_grad_()


def both_passes(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Callable:
    return passes(partial(function, *leaves), list(leaves), torch.randn_like(function(*leaves)))[1]


def rows() -> dict[str, Callable]:
    tensors = {n: x.requires_grad_() for n, x in mixer_inputs(1, TOKENS, HEADS, K, V).items()}
    leaves, width = list(tensors.values()), HEADS * V

    def operator(*_: torch.Tensor) -> torch.Tensor:
        return meta_linear_attention(**tensors, backend="triton")[0]

    def convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return short_convolution(x, weight, backend="triton")[0]

    heads = [random(1, HEADS, TOKENS, V) for _ in range(3)]
    sequence, weight = random(1, TOKENS, width), random(width, 1, 4)
    return {
        "meta_linear_attention": both_passes(operator, *leaves),
        "causal SDPA": both_passes(partial(F.scaled_dot_product_attention, is_causal=True), *heads),
        "short_convolution": both_passes(convolution, sequence, weight),
        "swiglu": both_passes(partial(swiglu, backend="triton"), random(1, TOKENS, 2 * 2816)),
        "nothing, with as many tensors": both_passes(Nothing.apply, *leaves),
    }


def host_ms(function: Callable) -> float:
    """Returns the median time until a call returns, while the GPU keeps up."""
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def profile(function: Callable) -> None:
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # which the profiler cannot follow
        profiler.runcall(lambda: [function() for _ in range(CALLS)])
    print(f"\n{CALLS} calls of meta_linear_attention, forward and backward, in one thread")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", action="store_true", help="print what the host does meanwhile")
    options = parser.parse_args()
    need_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':<32}{'host':>8}{'one thread':>12}{'launched':>10}{'graph':>8}")
    functions = rows()
    for name, function in functions.items():
        for _ in range(20):
            function()
        several = host_ms(function)
        with torch.autograd.set_multithreading_enabled(False):
            one = host_ms(function)
        line = f"{name:<32}{several:>8.3f}{one:>12.3f}{median_ms(function):>10.3f}"
        # A graph of nothing cannot be captured.
        print(line + ("" if "nothing" in name else f"{graph_ms(function):>8.3f}"), flush=True)
    if options.profile:
        profile(functions["meta_linear_attention"])


if __name__ == "__main__":
    run_script(main)
