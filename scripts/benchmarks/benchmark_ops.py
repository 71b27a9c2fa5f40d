"""Times the MetaLA operator on a GPU. `python -m pytest -m gpu tests/gpu` says whether it is right.

    python scripts/benchmarks/benchmark_ops.py
    python scripts/benchmarks/benchmark_ops.py --plot lengths.png   also draws time against length

Times are medians over runs with a cold cache, in bfloat16, of the mixer core: from the projections
to the gated output. "graph" is the same from a CUDA graph, without the host's launches. The memory
floor (roofline) is the time to read each input once and write each output once at the copy
bandwidth of this run. The plot goes from 1k to 256k tokens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import copy_bandwidth, graph_ms, median_ms, mixer_inputs, passes

from megatron_patch.commands.command_line import Parser, need_gpu, picture, run_script
from megatron_patch.ops import meta_linear_attention

# (batch, tokens, heads, K, V); the first is the one that targets are stated for.
SHAPES = [
    (16, 2048, 8, 64, 128),
    (1, 2048, 8, 64, 128),
    (1, 32768, 8, 64, 128),
    (16, 2048, 16, 64, 128),
    (16, 2048, 8, 128, 256),
]


def roofline(shape: tuple) -> tuple[int, int]:
    """Returns the bytes that forward, and forward and backward, must move."""
    batch, length, heads, k, v = shape
    keys, values = 2 * batch * length * heads * k, 2 * batch * length * heads * v
    forward = 2 * keys + 3 * values
    return forward, forward + 2 * keys + 3 * values + 2 * keys + 2 * values


def mixer(shape: tuple, backend: str):
    tensors = {n: x.requires_grad_() for n, x in mixer_inputs(*shape).items()}
    gradient = torch.randn(*shape[:3], shape[4], device="cuda").bfloat16()
    operator = partial(meta_linear_attention, **tensors, backend=backend)
    return passes(lambda: operator()[0], list(tensors.values()), gradient)


def attention(shape: tuple):
    """Causal softmax attention of the same model width: heads of V."""
    batch, length, heads, _, v = shape
    leaves = [
        torch.randn(batch, heads, length, v, device="cuda").bfloat16().requires_grad_()
        for _ in range(3)
    ]
    call = partial(F.scaled_dot_product_attention, *leaves, is_causal=True)
    return passes(call, leaves, torch.randn_like(leaves[0]))


def chunk_gla_alone(shape: tuple):
    from fla.ops.gla import chunk_gla

    tensors = mixer_inputs(*shape)
    g = (F.logsigmoid(tensors["gate_logits"].float()) / 16).requires_grad_()
    k = (1 - g.detach().exp()).bfloat16().requires_grad_()
    q, v = tensors["q"].requires_grad_(), tensors["v"].requires_grad_()
    return passes(lambda: chunk_gla(q, k, v, g)[0], [q, k, v, g], torch.randn_like(v))


def extra_memory(function) -> float:
    """Peak MiB allocated beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def first_call_seconds() -> float:
    """Forward and backward in a new process with an empty cache of compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        found = subprocess.run(
            [sys.executable, __file__, "--first-call"],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(found.stdout.split()[-1])


def time_all(with_fla: bool) -> None:
    speed = copy_bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; times in ms, bfloat16")
    header = (
        f"{'':<34}{'forward':>9}{'graph':>8}{'floors':>8}{'fwd+bwd':>9}{'graph':>8}{'floors':>8}"
    )
    print(header + f"{'MiB':>7}")
    for shape in SHAPES:
        batch, length, heads, k, v = shape
        print(f"{batch} x {length}, {heads} heads, K {k}, V {v}")
        floor, floor_both = (n / speed for n in roofline(shape))
        print(f"{'  memory floor':<34}{floor:>9.3f}{'':>16}{floor_both:>9.3f}")
        peers = [("metala, triton", mixer(shape, "triton")), ("causal SDPA", attention(shape))]
        if with_fla and shape == SHAPES[0]:  # which tunes itself for minutes per new shape
            peers += [("chunk_gla alone", chunk_gla_alone(shape))]
            peers += [("authors' composition on chunk_gla", mixer(shape, "fla"))]
        for name, (forward, both) in peers:
            both()
            times = median_ms(forward), graph_ms(forward), median_ms(both), graph_ms(both)
            memory = extra_memory(both)
            a, b, c, d = times
            print(
                f"  {name:<32}{a:>9.3f}{b:>8.3f}{b / floor:>8.1f}{c:>9.3f}{d:>8.3f}"
                f"{d / floor_both:>8.1f}{memory:>7.0f}",
                flush=True,
            )
        del peers, forward, both
    print(f"first call, compilation included: {first_call_seconds():.1f} s", flush=True)


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = [2**n for n in range(10, 19)]
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, build, longest in (
        ("MetaLA (this package)", lambda s: mixer(s, "triton"), 2**18),
        ("causal attention (SDPA)", attention, 2**17),
    ):
        points = [n for n in lengths if n <= longest]
        times = [median_ms(build((1, n, 8, 64, 128))[1]) for n in points]
        for n, ms in zip(points, times, strict=True):
            print(f"{name}, {n} tokens: {ms:.3f} ms, {n / ms / 1e3:.1f} M tokens/s", flush=True)
        axes.loglog(points, times, "o-", base=2, label=name)
    axes.set(xlabel="tokens", ylabel="forward + backward, ms", title=torch.cuda.get_device_name())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--plot", type=picture, metavar="PATH", help="draw time against length into this file"
    )
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    need_gpu()
    if options.first_call:
        _, both = mixer(SHAPES[0], "triton")
        torch.cuda.synchronize()
        start = time.perf_counter()
        both()
        torch.cuda.synchronize()
        print(time.perf_counter() - start)
        return
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    time_all(with_fla=find_spec("fla") is not None)
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    run_script(main)
