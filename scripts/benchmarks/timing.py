"""How the benchmarks of kernels time, and what they time with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_patch.commands.command_line import Parser, need_gpu

# The columns that `time_passes` fills.
HEADER = f"{'':<36}{'forward':>9}{'floors':>8}{'fwd+bwd':>9}{'floors':>8}"


def run_benchmark(description: str, time_all: Callable[[], None]) -> None:
    """Runs a benchmark whose command takes no options."""
    Parser(description=description).parse_args()
    need_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    time_all()


def median_ms(function: Callable[[], object]) -> float:
    """Returns the median time of a call with a cold cache, in milliseconds."""
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=80, return_mode="median")


def graph_ms(function: Callable[[], object]) -> float:
    """Returns the median time of a replayed CUDA graph, which leaves out the host's part."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    result = median_ms(graph.replay)
    del graph
    return result


def copy_bandwidth() -> float:
    """Returns the bytes per millisecond of a large copy, those read and those written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x))


def passes(
    call: Callable[[], torch.Tensor], leaves: list[torch.Tensor], gradient: torch.Tensor
) -> tuple[Callable, Callable]:
    """Returns functions that run a call's forward pass alone, and both passes."""

    def forward():
        with torch.no_grad():
            return call()

    def both():
        return torch.autograd.grad(call(), leaves, gradient)

    return forward, both


def time_passes(
    name: str,
    call: Callable[[], torch.Tensor],
    leaves: list[torch.Tensor],
    gradient: torch.Tensor,
    floors: tuple[float, float],
) -> tuple[list[float], str]:
    """Returns the times of a call's forward pass and of both passes as CUDA graphs, and a line of
    the table with these times and how often they hold their floors."""
    times = [graph_ms(function) for function in passes(call, leaves, gradient)]
    line = f"{name:<36}"
    for ms, floor in zip(times, floors, strict=True):
        line += f"{ms:>9.3f}{ms / floor:>8.2f}"
    return times, line


def mixer_inputs(
    batch: int, length: int, heads: int, k: int, v: int, *, state: bool = False
) -> dict[str, torch.Tensor]:
    """Draws the tensor arguments of `meta_linear_attention` in bfloat16; a state in float32."""
    keys, values = (batch, length, heads, k), (batch, length, heads, v)
    shapes = {
        "q": keys, "gate_logits": keys, "v": values, "aug": (heads, k), "out_gate": values,
        "out_gate_bias": (heads, v),
    }  # fmt: skip
    tensors = {name: torch.randn(s, device="cuda").bfloat16() for name, s in shapes.items()}
    if state:
        tensors["initial_state"] = torch.randn(batch, heads, k, v, device="cuda")
    return tensors
