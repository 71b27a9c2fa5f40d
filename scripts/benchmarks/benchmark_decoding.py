"""Times a decoding step on a GPU: the mixer core's kernels, and the kernel of a model's whole step.

    python scripts/benchmarks/benchmark_decoding.py
    python scripts/benchmarks/benchmark_decoding.py --sizes 380m

The core's times are of a replayed CUDA graph that holds the steps of several layers, one after the
other. Each layer updates a float32 state of its own in place; inputs are bfloat16. The floor
(roofline) is the time to read and write the state once at the copy bandwidth of this run.

A model's whole step at batch 1, with random weights in bfloat16, is launched again and again
without a graph, by the CUDA C++ kernel where it serves. Its limit is the time to read once all
weights that it reads, at the bandwidth that `benchmark_generate.py` would measure.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from benchmark_generate import (
    SIZES,
    VOCABULARY,
    build,
    bytes_read,
    free_memory,
    metala_config,
    read_bandwidth,
    time_steps,
)
from timing import copy_bandwidth, graph_ms, mixer_inputs

from megatron_patch.commands.command_line import Parser, need_gpu, one_of, run_script
from megatron_patch.hf import MetaLACache, MetaLAForCausalLM
from megatron_patch.hf.decoding_metala import make_token_decoder
from megatron_patch.ops import meta_linear_attention, short_convolution

# (heads, K, V)
WIDTHS = [(8, 64, 128), (8, 128, 256), (16, 64, 128)]
LAYERS = 16
STEPS = 200


def time_all() -> None:
    speed = copy_bandwidth()
    print(f"copy bandwidth {speed / 1e9:.2f} TB/s; microseconds a layer, of {LAYERS} in one graph")
    print(f"{'':<42}{'step':>8}{'floor':>8}{'ratio':>7}{'convolution':>13}")
    for batch in (1, 64):
        for heads, k, v in WIDTHS:
            layers = [mixer_inputs(batch, 1, heads, k, v, state=True) for _ in range(LAYERS)]
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
        kernel = make_token_decoder(model, states)
        if kernel is None:
            line += "   no kernel serves it here"
        else:
            step = partial(kernel.step, token, logits)
            seconds = time_steps(step, STEPS, 1, "cuda", device).seconds
            line += f"   cuda {1e3 * seconds:.3f} ({limit / seconds:.1%})"
            del step
        print(line, flush=True)
        del model, cache, states, kernel
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
    time_all()
    time_decoders(arguments.sizes, torch.device("cuda"))


if __name__ == "__main__":
    run_script(main)
