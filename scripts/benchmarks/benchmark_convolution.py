"""Checks the short convolution's kernels against float64 on a GPU, then times them beside others.

    python scripts/benchmarks/benchmark_convolution.py

Times are of a replayed CUDA graph, medians with a cold cache, bfloat16, W = 4, with SiLU. The floor
is the time to read each input once and write each output once at the copy bandwidth of this run.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product

import torch
from benchmark_ops import bandwidth, graph_ms, relative_error  # noqa: E402

from megatron_patch.commands.command_line import CommandError, Parser, need_gpu, run_script  # noqa: E402
from megatron_patch.ops import short_convolution  # noqa: E402

LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
BATCH, TIME = 16, 2048
KINDS = ("plain", "time-major", "state", "packed", "packed with state")
# dtype, channels, W, kind: all kinds as models have them, and each dtype and width of filter once.
CASES = [
    *product((torch.bfloat16,), (1000,), (4,), KINDS),
    *product((torch.bfloat16,), (37,), (2, 5), ("state", "packed")),
    *product((torch.float16, torch.float32), (1000,), (4,), ("time-major", "packed with state")),
]


def draw(batch, time, channels, width, dtype, *, sequences=None, time_major=False):
    """x, weight and initial state, leaves."""
    shape = (time, batch, channels) if time_major else (batch, time, channels)
    shapes = shape, (channels, 1, width), (sequences or batch, channels, width - 1)
    x, weight, state = (torch.randn(s, device="cuda").to(dtype) for s in shapes)
    x = x.transpose(0, 1) if time_major else x
    return {"x": x, "weight": weight, "initial_state": state}


def evaluate(tensors, weights, backend, dtype=None, **arguments):
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in tensors.items()}
    results = short_convolution(**leaves, backend=backend, **arguments)
    results = [x for x in results if x is not None]
    weights = [w.to(x) for w, x in zip(weights, results, strict=False)]
    return [*results, *torch.autograd.grad(results, list(leaves.values()), weights)]


def check_all() -> bool:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    wrong = 0
    for (dtype, channels, width, kind), length in product(CASES, (3, 33, 300)):
        packed, stateful = "packed" in kind, "state" in kind
        bounds = [0, length // 3, length // 3, length // 2, length]
        tensors = draw(
            1 if packed else 2, length, channels, width, dtype,
            sequences=4 if packed else None, time_major=kind == "time-major",
        )  # fmt: skip
        if not stateful:
            del tensors["initial_state"]
        how = {"output_final_state": stateful}
        if packed:
            how["cu_seqlens"] = torch.tensor(bounds, device="cuda")
        weights = [torch.randn_like(tensors["x"])]
        if stateful:
            weights += [torch.randn_like(tensors["initial_state"])]
        found = evaluate(tensors, weights, "triton", **how)
        again = evaluate(tensors, weights, "triton", **how)
        wanted = evaluate(tensors, weights, "torch", torch.float64, **how)
        error = max(relative_error(x, want) for x, want in zip(found, wanted, strict=True))
        if not error <= LIMITS[dtype] or not all(map(torch.equal, found, again)):
            wrong += 1
            print(f"WRONG {dtype} D {channels} W {width} {kind} T {length} {error}")
    torch.use_deterministic_algorithms(False)
    print(f"{3 * len(CASES)} checks against float64, {wrong} wrong", flush=True)
    return wrong == 0


def time_all() -> None:
    speed = bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; times in ms, {BATCH} x {TIME} tokens")
    print(f"{'':<36}{'forward':>9}{'floors':>8}{'fwd+bwd':>9}{'floors':>8}")
    backends = ["triton", "torch"] + ["causal_conv1d"] * (find_spec("causal_conv1d") is not None)
    for channels in (1024, 2048):
        floor = 2 * 2 * BATCH * TIME * channels / speed
        floor_both = floor + 3 * 2 * BATCH * TIME * channels / speed
        for time_major in (False, True):
            tensors = draw(BATCH, TIME, channels, 4, torch.bfloat16, time_major=time_major)
            leaves = [tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()]
            gradient = torch.randn_like(tensors["x"])
            for backend in backends:

                def forward(leaves=leaves, backend=backend):
                    with torch.no_grad():
                        return short_convolution(*leaves, backend=backend)[0]

                def both(leaves=leaves, backend=backend, gradient=gradient):
                    y = short_convolution(*leaves, backend=backend)[0]
                    return torch.autograd.grad(y, leaves, gradient)

                a, b = graph_ms(forward), graph_ms(both)
                layout = "time-major" if time_major else "batch-major"
                name = f"d {channels}, {layout}, {backend}"
                ratios = a / floor, b / floor_both
                print(f"{name:<36}{a:>9.3f}{ratios[0]:>8.2f}{b:>9.3f}{ratios[1]:>8.2f}", flush=True)


def main() -> None:
    Parser(description=__doc__.split("\n")[0]).parse_args()
    need_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not check_all():
        raise CommandError("the kernels are wrong on this machine; not timed")
    time_all()


if __name__ == "__main__":
    run_script(main)
