"""Checks the MetaLA operator's Triton kernels against float64 on a GPU, then times them.

    python scripts/benchmarks/benchmark_ops.py                      checks, then timings
    python scripts/benchmarks/benchmark_ops.py --no-check           timings alone
    python scripts/benchmarks/benchmark_ops.py --plot lengths.png   also draws time against length, 1k to 256k

Timings are medians over runs with a cold cache, in bfloat16, of the mixer core: from the
projections to the gated output. "graph" is the same from a CUDA graph, without the host's
launches. The floor is the time to read each input once and write each output once at the copy
bandwidth of this run.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_patch.commands.command_line import (  # noqa: E402
    CommandError,
    Parser,
    need_gpu,
    picture,
    run_script,
    whole,
)
from megatron_patch.ops import chunked, meta_linear_attention  # noqa: E402

# (batch, tokens, heads, K, V); the first is the one that targets are stated for.
SHAPES = [
    (16, 2048, 8, 64, 128),
    (1, 32768, 8, 64, 128),
    (16, 2048, 16, 64, 128),
    (16, 2048, 8, 128, 256),
]
NAMES = ("q", "gate_logits", "v", "aug", "out_gate", "out_gate_bias", "initial_state")
WIDTHS = [(32, 64), (64, 128), (96, 192), (128, 256), (48, 96), (256, 512), (40, 80), (36, 72)]
# Of other `expand_k`: K = V for 1.0, K = 2 V for 2.0.
WIDTHS += [(k, k) for k in (16, 32, 40, 64, 96, 128, 256)] + [(64, 32), (128, 64)]
# Not in bfloat16 alone.
IN_ALL_DTYPES = [(64, 128), (128, 256), (40, 80), (40, 40), (64, 64), (128, 128)]
LENGTHS = [17, 300, 2500]
# Medians of errors over random draws stay below this in bfloat16, and in all dtypes below this
# multiple of those of chunked PyTorch whose products take operands of the same dtype. Not the worst
# draw's: some are ill-conditioned, for any rounding.
BFLOAT16_LIMIT, RATIO_LIMIT = 1e-2, 1.5
# In a single draw of few tokens chance decides which of the two is nearer: so many draws, or more
# where they have fewer than so many tokens together.
DRAWS, TOKENS = 9, 800
ROUNDOFF = 2.0**-24  # of float32, in which sums are: a form that is luckier is no measure
UNCHECKED = 4  # tokens at the start of a sequence that has no state before it


def make(batch, time_, heads, k, v, dtype, *, sequences=None, gates=1.0, state=False):
    shapes = [(batch, time_, heads, k)] * 2 + [(batch, time_, heads, v), (heads, k)]
    shapes += [(batch, time_, heads, v), (heads, v), (sequences or batch, heads, k, v)]
    tensors = {
        name: torch.randn(shape, device="cuda").to(
            torch.float32 if name == "initial_state" else dtype
        )
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    tensors["gate_logits"] *= gates
    if not state:
        del tensors["initial_state"]
    return tensors


def chunked_in_bfloat16(**arguments):
    """Chunked PyTorch, whose matrix products take bfloat16 operands, as the kernels' do."""
    with torch.autocast("cuda", torch.bfloat16):
        return chunked.meta_linear_attention(
            **arguments, tau=16.0, scale=arguments["q"].shape[-1] ** -0.5, norm_eps=1e-5
        )


def evaluate(tensors, weights, operator, dtype=None, **arguments):
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in tensors.items()}
    out, final = operator(**leaves, **arguments)
    results = [out] if final is None else [out, final]
    weights = [w.to(x) for w, x in zip(weights, results, strict=False)]
    gradients = torch.autograd.grad(results, list(leaves.values()), weights)
    return [*results, *gradients]


def relative_error(x, want) -> float:
    return ((x.double() - want).norm() / want.norm()).item()


def check(case: tuple) -> tuple[bool, str]:
    """Checks one configuration; returns whether it is right, and a line that says how right."""
    k, v, dtype, length, kind = case
    label = f"{k:>4} {v:>4} {str(dtype)[6:]:>9} {length:>5} {kind:<13}"
    # Fills what `torch.empty` returns with NaN: an element that no kernel writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        draws = [errors_of_a_draw(case) for _ in range(max(DRAWS, TOKENS // length))]
        torch.cuda.synchronize()
    except Exception as error:  # an illegal access ends the process: report it
        return False, f"{label} {error!r:.120}"
    equal = all(same for same, _ in draws)
    errors = torch.tensor([found for _, found in draws], dtype=torch.float64)  # [draws, results, 2]
    worst = errors[:, :, 0].max().item()
    ours, chunked_form = errors.median(0).values.unbind(1)
    ratio = (ours / chunked_form.clamp_min(ROUNDOFF)).max().item()
    right = equal and ratio <= RATIO_LIMIT  # not if there is a NaN in any draw
    if dtype == torch.bfloat16:
        right &= ours.max().item() <= BFLOAT16_LIMIT
    line = f"{label} error {ours.max().item():.1e} (worst draw {worst:.1e}), "
    line += f"{ratio:4.2f} times chunked PyTorch's at most, "
    return right, line + ("bits equal" if equal else "BITS DIFFER")


def errors_of_a_draw(case: tuple) -> tuple[bool, list[list[float]]]:
    """Whether two runs of the kernels on random inputs give the same bits, and of each result the
    relative errors of the kernels and of chunked PyTorch with operands of the same dtype."""
    k, v, dtype, length, kind = case
    heads, arguments = SHAPES[0][2], {"output_final_state": kind != "plain"}
    sequences = None
    if kind == "packed":
        bounds = sorted({0, length // 3, length // 3 + 1, length})
        arguments["cu_seqlens"] = torch.tensor([0, *bounds], device="cuda")
        sequences = len(bounds)
    tensors = make(
        1, length, heads, k, v, dtype, sequences=sequences, state=kind != "plain",
        gates=1e4 if kind == "strong gates" else 1.0,
    )  # fmt: skip
    if kind == "mixed gates":
        tensors["gate_logits"][:, : length // 2, 0] *= 1e3
    weights = [
        torch.randn(1, length, heads, v, device="cuda").bfloat16(),
        torch.randn(sequences or 1, heads, k, v, device="cuda"),
    ]
    if kind == "plain":
        # Without a state before it, a first token's y is alpha v + sigmoid(beta v), which can be
        # all but constant over a head, and LayerNorm then magnifies any rounding up to 300 times;
        # so can the next few. The other kinds have a state, and check first tokens too.
        weights[0][:, :UNCHECKED] = 0
    kernels = partial(meta_linear_attention, backend="triton")
    in_any_dtype = partial(meta_linear_attention, backend="chunked")
    form = chunked_in_bfloat16 if dtype == torch.bfloat16 else in_any_dtype
    found, again = (evaluate(tensors, weights, kernels, **arguments) for _ in range(2))
    peer = evaluate(tensors, weights, form, **arguments)
    wanted = evaluate(tensors, weights, in_any_dtype, torch.float64, **arguments)
    same = all(map(torch.equal, found, again))
    if kind == "plain":
        for results in (found, peer, wanted):
            results[0] = results[0][:, UNCHECKED:]
    errors = []
    for want, *results in zip(wanted, found, peer, strict=True):
        if want.norm().item() <= 1e-5 * want.numel() ** 0.5:
            # What is zero up to rounding has no relative error, but is finite.
            errors.append([0.0 if x.isfinite().all() else math.nan for x in results])
        else:
            errors.append([relative_error(x, want) for x in results])
    return same, errors


def check_all(jobs: int) -> bool:
    kinds = ("plain", "state", "packed", "strong gates", "mixed gates")
    cases = [
        (k, v, dtype, length, kind)
        for k, v in WIDTHS
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for length in LENGTHS
        for kind in kinds
        # The rarer kinds at two lengths.
        if length in (300, 2500) or kind in ("plain", "state")
        if dtype == torch.bfloat16 or (k, v) in IN_ALL_DTYPES
    ]
    groups: dict[tuple, list] = {}
    for case in cases:  # one process per kernel configuration compiles it once
        groups.setdefault(case[:3], []).append(case)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        wrong = sum(pool.map(_check_group, groups.values()))
    print(f"{len(cases)} checks against float64, {wrong} wrong", flush=True)
    wrong += not check_beyond_32_bits()
    return wrong == 0


def check_beyond_32_bits() -> bool:
    """Whether the end of a sequence of more than 2^31 values gives what the same tokens give alone,
    from the state before them: bit for bit, as they lie in the same chunks."""
    heads, k, v, tail = 64, 64, 128, 4096
    length = 2**31 // (heads * v) + tail
    tensors = make(1, length, heads, k, v, torch.bfloat16)
    parameters = ("aug", "out_gate_bias")
    weights = torch.randn(1, tail, heads, v, device="cuda").bfloat16()

    def run(span: slice, **arguments):
        part = {n: x if n in parameters else x[:, span] for n, x in tensors.items()}
        value = part["v"] = part["v"].detach().requires_grad_(arguments.pop("gradient", False))
        out, state = meta_linear_attention(**part, backend="triton", **arguments)
        return out, state, value

    with torch.no_grad():
        state = run(slice(0, length - tail), output_final_state=True)[1]
    out, _, value = run(slice(length - tail, length), initial_state=state, gradient=True)
    wanted = [out, *torch.autograd.grad(out, value, weights)]
    out, _, value = run(slice(0, length), gradient=True)
    gradient = torch.zeros_like(out)
    gradient[:, -tail:] = weights
    found = [out, *torch.autograd.grad(out, value, gradient)]
    right = all(torch.equal(x[:, -tail:], y) for x, y in zip(found, wanted, strict=True))
    print("ok   " if right else "WRONG", f"{length} tokens, {heads} heads: the last as alone")
    return right


def _check_group(cases: list) -> int:
    """Checks and prints; returns how many are wrong."""
    wrong = 0
    for case in cases:
        right, line = check(case)
        wrong += not right
        print("ok   " if right else "WRONG", line, flush=True)
    return wrong


def median_ms(function) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=80, return_mode="median")


def graph_ms(function) -> float:
    """Median time of a replay, without the host's part."""
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


def bandwidth() -> float:
    """Bytes per millisecond of a large copy, counting those read and those written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x))


def floors(shape: tuple) -> tuple[int, int]:
    """Bytes that forward, and forward and backward, must move."""
    batch, length, heads, k, v = shape
    keys, values = 2 * batch * length * heads * k, 2 * batch * length * heads * v
    forward = 2 * keys + 3 * values
    return forward, forward + 2 * keys + 3 * values + 2 * keys + 2 * values


def mixer(shape: tuple, backend: str):
    tensors = {n: x.requires_grad_() for n, x in make(*shape, torch.bfloat16).items()}
    gradient = torch.randn(*shape[:3], shape[4], device="cuda").bfloat16()
    leaves = list(tensors.values())

    def forward():
        with torch.no_grad():
            return meta_linear_attention(**tensors, backend=backend)[0]

    def both():
        out = meta_linear_attention(**tensors, backend=backend)[0]
        return torch.autograd.grad(out, leaves, gradient)

    return forward, both


def attention(shape: tuple):
    """Causal softmax attention of the same model width: heads of V."""
    batch, length, heads, _, v = shape
    q, k, x = (
        torch.randn(batch, heads, length, v, device="cuda").bfloat16().requires_grad_()
        for _ in range(3)
    )
    gradient = torch.randn_like(q)

    def forward():
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, x, is_causal=True)

    def both():
        out = F.scaled_dot_product_attention(q, k, x, is_causal=True)
        return torch.autograd.grad(out, (q, k, x), gradient)

    return forward, both


def chunk_gla_alone(shape: tuple):
    from fla.ops.gla import chunk_gla

    tensors = make(*shape, torch.bfloat16)
    g = (F.logsigmoid(tensors["gate_logits"].float()) / 16).requires_grad_()
    k = (1 - g.detach().exp()).bfloat16().requires_grad_()
    q, v = tensors["q"].requires_grad_(), tensors["v"].requires_grad_()
    gradient = torch.randn_like(v)

    def forward():
        with torch.no_grad():
            return chunk_gla(q, k, v, g)[0]

    def both():
        return torch.autograd.grad(chunk_gla(q, k, v, g)[0], (q, k, v, g), gradient)

    return forward, both


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
    speed = bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; times in ms, bfloat16")
    header = (
        f"{'':<34}{'forward':>9}{'graph':>8}{'floors':>8}{'fwd+bwd':>9}{'graph':>8}{'floors':>8}"
    )
    print(" " * 34 + header + f"{'MiB':>7}")
    for shape in SHAPES:
        batch, length, heads, k, v = shape
        print(f"{batch} x {length}, {heads} heads, K {k}, V {v}")
        floor, floor_both = (n / speed for n in floors(shape))
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
    parser.add_argument("--no-check", action="store_true", help="time without checking first")
    parser.add_argument("--no-time", action="store_true", help="check without timing")
    parser.add_argument(
        "--plot", type=picture, metavar="PATH", help="draw time against length into this file"
    )
    parser.add_argument("--jobs", type=whole(1), default=min(8, os.cpu_count() or 1))
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
    if not options.no_check and not check_all(options.jobs):
        raise CommandError("the kernels are wrong on this machine; not timed")
    if not options.no_time:
        time_all(with_fla=find_spec("fla") is not None)
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    run_script(main)
