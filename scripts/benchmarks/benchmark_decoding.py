"""Checks the decoding step's kernels against float64 on a GPU, then times the mixer core's, and
those of a whole model's step.

    python scripts/benchmarks/benchmark_decoding.py
    python scripts/benchmarks/benchmark_decoding.py --sizes 380m

The core's times are of a replayed CUDA graph that holds the step of several layers, one after the
other, each with a float32 state of its own that is updated in place; inputs are bfloat16. The floor
is the time to read and write the state once at the copy bandwidth of this run.

A whole model's step at batch 1, by either kernel (in CUDA C++, where it serves, and in Triton), is
launched again and again, without a graph; random weights in bfloat16. Its limit is the time to read
once all weights that it reads, at the bandwidth that `benchmark_generate.py` would measure. These
kernels are checked by tests/ops.
"""

from __future__ import annotations

import argparse
from functools import partial
from unittest import mock

import torch
from benchmark_generate import (  # noqa: E402
    SIZES,
    VOCABULARY,
    build,
    bytes_read,
    free_memory,
    metala_config,
    read_bandwidth,
    time_steps,
)
from benchmark_ops import bandwidth, graph_ms, make, relative_error  # noqa: E402

from megatron_patch.commands.command_line import CommandError, Parser, need_gpu, one_of, run_script  # noqa: E402
from megatron_patch.hf import MetaLACache, MetaLAForCausalLM  # noqa: E402
from megatron_patch.hf.decoding_metala import make_token_decoder  # noqa: E402
from megatron_patch.ops import backends, meta_linear_attention, short_convolution  # noqa: E402

# (heads, K, V)
WIDTHS = [(8, 64, 128), (8, 128, 256), (16, 64, 128), (4, 256, 512), (8, 40, 80), (8, 48, 96)]
WIDTHS += [(8, 16, 16), (16, 32, 32), (8, 64, 64), (8, 128, 128), (4, 256, 256), (8, 128, 64)]
TIMED = WIDTHS[:3]
LAYERS = 16
STEPS = 200
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def check(operator, tensors: dict, judge: str, limit: float, name: str) -> bool:
    """Whether both forms of a step agree with float64, and with each other bit by bit."""
    exact = {n: x.double() for n, x in tensors.items()}
    wanted = operator(**exact, output_final_state=True, backend=judge)
    found = operator(**tensors, output_final_state=True, backend="triton")
    inplace = operator(**tensors, inplace_final_state=True, backend="triton")
    errors = [relative_error(x, want) for x, want in zip(found, wanted, strict=True)]
    right = max(errors) <= limit and all(map(torch.equal, found, inplace))
    print(f"{'ok   ' if right else 'WRONG'} {name}: " + ", ".join(f"{e:.1e}" for e in errors))
    return right


def check_all() -> bool:
    right = True
    for dtype, limit in LIMITS.items():
        for heads, k, v in WIDTHS:
            for batch, gates in ((1, 1.0), (5, 1.0), (5, 1e4)):
                x = make(batch, 1, heads, k, v, dtype, state=True, gates=gates)
                name = f"core, batch {batch}, {heads} heads, K {k}, V {v}, gates {gates:g}, {dtype}"
                right &= check(meta_linear_attention, x, "reference", limit, name)
        for width in (1, 2, 4, 5):
            shapes = {"x": (5, 1, 1000), "weight": (1000, 1, width)}
            shapes["initial_state"] = (5, 1000, width - 1)
            x = {n: torch.randn(s, device="cuda").to(dtype) for n, s in shapes.items()}
            if width == 1:
                del x["initial_state"]
                y = short_convolution(**x, backend="triton")[0]
                exact = {n: t.double() for n, t in x.items()}
                error = relative_error(y, short_convolution(**exact, backend="torch")[0])
                print(f"{'ok   ' if error <= limit else 'WRONG'} convolution, W 1: {error:.1e}")
                right &= error <= limit
            else:
                name = f"convolution, W {width}, {dtype}"
                right &= check(short_convolution, x, "torch", limit, name)
    return right


def time_all() -> None:
    speed = bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; microseconds a layer, of {LAYERS} in one graph")
    print(f"{'':<42}{'step':>8}{'floor':>8}{'ratio':>7}{'convolution':>13}")
    for batch in (1, 64):
        for heads, k, v in TIMED:
            shape = (batch, 1, heads, k, v, torch.bfloat16)
            layers = [make(*shape, state=True) for _ in range(LAYERS)]
            channels = heads * v
            row = torch.randn(batch, 1, channels, device="cuda").bfloat16()
            weight = torch.randn(channels, 1, 4, device="cuda").bfloat16()
            pasts = torch.randn(LAYERS, batch, channels, 3, device="cuda").bfloat16()

            def step(layers=layers):
                for x in layers:
                    meta_linear_attention(**x, inplace_final_state=True, backend="triton")

            def convolution(row=row, weight=weight, pasts=pasts):
                for past in pasts:
                    short_convolution(
                        row, weight, initial_state=past, inplace_final_state=True, backend="triton"
                    )

            with torch.no_grad():
                found = 1e3 * graph_ms(step) / LAYERS
                beside = 1e3 * graph_ms(convolution) / LAYERS
            floor = 1e3 * 2 * layers[0]["initial_state"].numel() * 4 / speed
            name = f"batch {batch}, d {channels}, {heads} heads, K {k}, V {v}"
            print(f"{name:<42}{found:>8.1f}{floor:>8.1f}{found / floor:>7.2f}{beside:>13.1f}")


@torch.no_grad()
def time_decoders(names: list[str], device: torch.device) -> None:
    module = backends.REGISTRY["token_decoder"]["cuda"].module
    speed = read_bandwidth(device)
    free_memory(device)
    print(f"read bandwidth {speed / 1e12:.2f} TB/s; milliseconds a step, and share of the limit")
    for name in names:
        model = build(MetaLAForCausalLM, metala_config(name), device)
        token = torch.randint(VOCABULARY, (1, 1), device=device)
        logits = torch.empty(VOCABULARY, dtype=torch.bfloat16, device=device)
        cache = MetaLACache(model.config)
        model(token, past_key_values=cache)
        states = [cache.states(layer) for layer in range(len(cache))]
        limit = bytes_read(model) / speed
        line = f"{name:<6} limit {1e3 * limit:.3f}"
        kernels = {}  # by the part of megatron_patch.ops that each is of
        for failure in (backends.import_failure(module), "is left out"):
            with mock.patch.dict(backends._failures, {module: failure}):
                kernel = make_token_decoder(model, states)
            kernels[type(kernel).__module__.split(".")[2]] = kernel
        for language, kernel in kernels.items():
            step = partial(kernel.step, token, logits)
            seconds = time_steps(step, STEPS, 1, language, device).seconds
            line += f"   {language} {1e3 * seconds:.3f} ({limit / seconds:.1%})"
        print(line, flush=True)
        del model, cache, states, kernels, kernel, step
        free_memory(device)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", type=one_of(SIZES), default=["380m", "1b", "3b"],
        help="of configs/metala_*.yml, whose whole step is timed",
    )  # fmt: skip
    arguments = parser.parse_args()
    need_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not check_all():
        raise CommandError("the kernels are wrong on this machine; not timed")
    time_all()
    time_decoders(arguments.sizes, torch.device("cuda"))


if __name__ == "__main__":
    run_script(main)
