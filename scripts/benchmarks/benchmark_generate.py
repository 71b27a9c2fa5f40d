#!/usr/bin/env python3
"""Times decoding of a MetaLA model beside a LLaMA of equal size in transformers.

    python scripts/benchmarks/benchmark_generate.py    0.38B, batches 1 and 64, contexts 1k to 128k
    python scripts/benchmarks/benchmark_generate.py --size 1b --batches 1
    python scripts/benchmarks/benchmark_generate.py --device cpu --size tiny --contexts 16 32

Prints, for each batch and context: tokens per second over all rows, milliseconds a step and peak
memory (weights included) of both models, their ratio, and at batch 1 the share of the roofline that
MetaLA reaches. The roofline is the time to read once all weights that a step reads, at this run's
bandwidth. Draws tokens per second against context (`--plot`).

Both models have random weights in bfloat16, equal width, layers, MLP, heads and vocabulary. They
take greedy steps behind the context.

- MetaLA reads the context and decodes as generate(cache_implementation="static") does: by a CUDA
  graph, or for one sequence by one kernel where that serves.
- LLaMA, the baseline, has scaled_dot_product_attention and a static cache of random numbers (their
  values do not change its speed). A CUDA graph replays its step: its own kernels and, while
  --budget lasts, compiled by torch.compile. The faster one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from megatron_patch.commands.command_line import Parser, number, one_of, picture, run_script, whole
from megatron_patch.commands.command_line import device as device_name
from megatron_patch.hf import MetaLACache, MetaLAConfig, MetaLAForCausalLM
from megatron_patch.hf.decoding_metala import COMPILE_OPTIONS, capture_cuda_graph

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {path.stem.removeprefix("metala_"): path for path in sorted(CONFIGS.glob("metala_*.yml"))}
VOCABULARY = 32000
WARM_UP_STEPS = 8
TOKENS_AT_ONCE = 2**17  # MetaLA reads its context in pieces of so many tokens, over all rows
USABLE_MEMORY = 0.92  # share of the GPU's memory that weights, keys and values may take


@dataclass
class Speed:
    """A decoding speed.

    Attributes:
        tokens_per_second: over all rows.
        seconds: of a step.
        memory: peak bytes while decoding, weights included; 0 on a CPU.
        how: what ran the step: a kind of CUDA graph, or "plain".
    """

    tokens_per_second: float
    seconds: float
    memory: int
    how: str


def sizes(name: str) -> dict[str, int]:
    """Returns the LLaMA-style sizes of a configuration in configs/, with VOCABULARY tokens."""
    settings = yaml.safe_load(SIZES[name].read_text(encoding="utf-8"))
    same = ("hidden_size", "num_attention_heads", "intermediate_size")
    own = {"num_hidden_layers": settings["num_layers"], "vocab_size": VOCABULARY}
    return {**{key: settings[key] for key in same}, **own}


def metala_config(name: str) -> MetaLAConfig:
    """Returns the MetaLA configuration of a size in configs/, with its expand_k."""
    settings = yaml.safe_load(SIZES[name].read_text(encoding="utf-8"))
    return MetaLAConfig(**sizes(name), expand_k=settings.get("metala", {}).get("expand_k", 0.5))


def build(kind: type[nn.Module], config, device: torch.device) -> nn.Module:
    """Returns a model with random weights in bfloat16, made on its device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_steps(step: Callable[[], None], steps: int, batch: int, how: str, device) -> Speed:
    """Times `steps` runs of a decoding step, after WARM_UP_STEPS that do not count."""
    for _ in range(WARM_UP_STEPS):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    seconds = (time.perf_counter() - start) / steps
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Speed(batch / seconds, seconds, memory, how)


def read_bandwidth(device: torch.device) -> float:
    """Returns the memory bandwidth in bytes per second: a copy's or a sum's, the higher one."""
    size = 2**30 if device.type == "cuda" else 2**25
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    found = 0.0
    for run, factor in ((lambda: target.copy_(source), 2), (lambda: source.sum(), 1)):
        run()
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(4):
                run()
            synchronize(device)
            seconds = (time.perf_counter() - start) / 4
            found = max(found, factor * source.nbytes / seconds)
    return found


def bytes_read(model: nn.Module) -> int:
    """Returns the bytes of weights that a step reads: all but the embedding, unless it is tied."""
    skipped = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is skipped:
        skipped = None
    return sum(p.nbytes for p in model.parameters() if p is not skipped)


def metala_speeds(
    model: MetaLAForCausalLM,
    batch: int,
    contexts: list[int],
    steps: int,
    device: torch.device,
    kind: str | None,
) -> Iterator[Speed]:
    """Yields the speed behind each context. Contexts ascend; one state reads on to the next one."""
    cache = MetaLACache(model.config, decoding_graph=kind)
    for context in contexts:
        while (missing := context - cache.get_seq_length()) > 0:
            time_ = min(missing, max(1, TOKENS_AT_ONCE // batch))
            ids = torch.randint(VOCABULARY, (batch, time_), device=device)
            model(ids, past_key_values=cache, logits_to_keep=1)
        ids = torch.randint(VOCABULARY, (batch, 1), device=device)

        def step(ids=ids) -> None:
            logits = model(ids, past_key_values=cache).logits
            ids.copy_(logits[:, -1:].argmax(-1))

        yield time_steps(step, steps, batch, kind or "plain", device)


def llama_bytes(config: LlamaConfig, batch: int, context: int) -> int:
    """Returns the bytes of LLaMA's keys and values in bfloat16."""
    return 2 * 2 * config.num_hidden_layers * config.hidden_size * batch * context


def llama_speed(
    model: LlamaForCausalLM,
    batch: int,
    context: int,
    steps: int,
    device: torch.device,
    may_compile: Callable[[], bool],
) -> Speed:
    """Returns LLaMA's best speed behind a context: by its own kernels, or compiled."""
    config = model.config
    found = []
    room = context + 2 * (WARM_UP_STEPS + steps) + 16  # two runs, and the steps before each capture
    cache = StaticCache(config=config, max_cache_len=room)
    heads = config.num_key_value_heads
    cache.early_initialization(batch, heads, config.head_dim, torch.bfloat16, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    ids = torch.randint(VOCABULARY, (batch, 1), device=device)
    forward = model.forward
    for kind in ("eager", "compiled") if device.type == "cuda" else ("plain",):
        if kind == "compiled":
            if not may_compile():
                continue
            torch._dynamo.reset()
            forward = torch.compile(forward, dynamic=False, options=COMPILE_OPTIONS)

        def step(forward=forward) -> None:
            logits = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits[:, -1:].argmax(-1))

        run = capture_cuda_graph(step) if device.type == "cuda" else step
        found.append(time_steps(run, steps, batch, kind, device))
        del run
    return max(found, key=lambda speed: speed.tokens_per_second)


def print_generate_speeds(model: MetaLAForCausalLM, tokens: int, device: torch.device) -> None:
    """Prints the tokens per second that `generate` reaches at batch 1, its Python included."""
    ids = torch.randint(VOCABULARY, (1, 64), device=device)
    how = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    for name in (None, "static"):
        more = {} if name is None else {"cache_implementation": name}
        model.generate(ids, **how, **more)
        synchronize(device)
        start = time.perf_counter()
        model.generate(ids, **how, **more)
        synchronize(device)
        print(
            f"MetaLA by generate(...{name}): {tokens / (time.perf_counter() - start):.0f} tokens/s"
        )


def plot(results: dict[tuple[int, int], tuple[Speed, Speed | None]], path: Path, title: str):
    """Draws tokens per second against context, a panel a batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({batch for batch, _ in results})
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(4.6 * len(batches), 3.8), layout="constrained", squeeze=False
    )
    for axes, batch in zip(panels[0], batches, strict=True):
        for index, name in enumerate(("MetaLA", "LLaMA")):
            points = {
                context: speeds[index].tokens_per_second
                for (rows, context), speeds in results.items()
                if rows == batch and speeds[index] is not None
            }
            axes.loglog(list(points), list(points.values()), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="context (tokens)", ylabel="tokens/s", title=f"batch {batch}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=one_of(SIZES), default="380m", help="of configs/metala_*.yml")
    add("--batches", type=whole(1), nargs="+", default=[1, 64])
    add("--contexts", type=whole(1), nargs="+", default=[2**n for n in (10, 13, 15, 17)])
    add("--steps", type=whole(1), default=48, help="timed steps")
    add("--decoding-graph", type=one_of(("compiled", "eager")), default="compiled", help="MetaLA's")
    seconds = number(lambda x: x >= 0, "of seconds, 0 or more")
    add("--budget", type=seconds, default=240, help="then compiles no more")
    add("--plot", type=picture, default="benchmark_generate.png")
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for name in ("batches", "contexts"):
        setattr(arguments, name, sorted(set(getattr(arguments, name))))
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    shape = sizes(arguments.size)
    speed = read_bandwidth(device)
    free_memory(device)

    # One model at a time: each gets the whole GPU's memory.
    metala = build(MetaLAForCausalLM, metala_config(arguments.size), device)
    limit = bytes_read(metala) / speed
    print(
        f"{name}, torch {torch.__version__}, bfloat16; MetaLA of "
        f"{sum(p.numel() for p in metala.parameters()) / 1e6:.1f}M parameters\n"
        f"memory bandwidth {speed / 1e12:.3f} TB/s; reading MetaLA's weights once: "
        f"{limit * 1e3:.3f} ms"
    )
    print_generate_speeds(metala, 128 if on_gpu else 8, device)
    kind = arguments.decoding_graph if on_gpu else None
    ours: dict[tuple[int, int], Speed] = {}
    for batch in arguments.batches:
        speeds = metala_speeds(metala, batch, arguments.contexts, arguments.steps, device, kind)
        for context, mine in zip(arguments.contexts, speeds, strict=True):
            ours[batch, context] = mine
    del metala, speeds
    free_memory(device)

    rope = 2 * max(arguments.contexts)
    config = LlamaConfig(**shape, max_position_embeddings=rope, attn_implementation="sdpa")
    llama = build(LlamaForCausalLM, config, device)
    print(f"LLaMA of {sum(p.numel() for p in llama.parameters()) / 1e6:.1f}M parameters\n")
    print(
        f"{'batch':>5}{'context':>8} | {'MetaLA tokens/s':>15}{'ms':>8}{'GB':>7}{'':>9} | "
        f"{'LLaMA tokens/s':>14}{'ms':>8}{'GB':>7}{'':>9} | {'ratio':>6}  weight-read limit"
    )

    def may_compile() -> bool:
        return time.perf_counter() - start < arguments.budget

    results: dict[tuple[int, int], tuple[Speed, Speed | None]] = {}
    for (batch, context), mine in ours.items():
        theirs, words = None, ""
        needed = sum(p.nbytes for p in llama.parameters()) + llama_bytes(config, batch, context)
        if on_gpu and needed > USABLE_MEMORY * torch.cuda.get_device_properties(0).total_memory:
            words = f"does not fit: needs {needed / 1e9:.0f} GB"
        else:
            # The estimate leaves out activations, so memory may still run out.
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                theirs = llama_speed(llama, batch, context, arguments.steps, device, may_compile)
            words = words if theirs else "does not fit: out of memory"
            free_memory(device)
        results[batch, context] = mine, theirs
        print(line(batch, context, mine, theirs, words, limit), flush=True)

    plot(results, arguments.plot, f"Decoding, {arguments.size}, {name}")
    print(f"\n{arguments.plot}, {time.perf_counter() - start:.0f} s in all")


def line(
    batch: int, context: int, mine: Speed, theirs: Speed | None, words: str, limit: float
) -> str:
    """Returns a row of the table."""

    def columns(speed: Speed, width: int) -> str:
        return (
            f"{speed.tokens_per_second:>{width}.0f}{speed.seconds * 1e3:>8.3f}"
            f"{speed.memory / 1e9:>7.2f}{speed.how:>9}"
        )

    row = f"{batch:>5}{context:>8} | {columns(mine, 15)} | "
    if theirs is None:
        row += f"{words:<38} | {'':>6}"
    else:
        ratio = mine.tokens_per_second / theirs.tokens_per_second
        row += f"{columns(theirs, 14)} | {ratio:>5.2f}x"
    return row + (f"  {limit / mine.seconds:.0%}" if batch == 1 else "")


if __name__ == "__main__":
    run_script(main, torch.cuda.OutOfMemoryError)
