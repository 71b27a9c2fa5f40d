#!/usr/bin/env python3
"""Times training steps of another model in a bare loop: a compiled LLaMA, or GLA.

    python scripts/benchmarks/peer_step.py --model llama --layers 24 --width 1024 --heads 8 \\
        --mlp 2816 --length 2048 --micro-batch 8

is what benchmark_training.py runs beside GPT-NeoX, without a framework's costs. `llama` is the
strongest softmax attention of equal size that PyTorch gives: transformers, SDPA, torch.compile.
`gla` is Gated Linear Attention (arXiv 2312.06635) as flash-linear-attention trains it; its kernels
tune themselves for minutes when a shape is new. Both have fused AdamW; weights and optimizer are
float32, products bfloat16 by autocast. Prints JSON: the milliseconds of each step, GB reserved,
parameters.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from megatron_patch.commands.command_line import CommandError, Parser, one_of, run_script, whole

PEERS = ("llama", "gla")
WARM_UP = 5


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=one_of(PEERS), default="llama", help="llama or gla")
    for name, default in (
        ("layers", 24), ("width", 1024), ("heads", 8), ("mlp", 2816), ("vocabulary", 32_000),
        ("length", 2048), ("micro-batch", 8), ("steps", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=whole(1), default=default, help=f"default: {default}")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise CommandError("found no CUDA device, wanted one")
    print(json.dumps(measure(options)), flush=True)


def build(options) -> torch.nn.Module:
    """Returns the model, on the CPU. Raises a CommandError if its package is missing."""
    sizes = dict(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        max_position_embeddings=options.length,
        use_cache=False,
        tie_word_embeddings=False,
    )
    if options.model == "gla":
        try:
            from fla.models import GLAConfig, GLAForCausalLM
        except ImportError as error:
            raise CommandError(f"--model gla: needs flash-linear-attention ({error})") from error
        return GLAForCausalLM(GLAConfig(**sizes, num_heads=options.heads))
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, num_attention_heads=options.heads, attn_implementation="sdpa")
    return LlamaForCausalLM(config)


def measure(options) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = build(options).cuda()
    run = torch.compile(model) if options.model == "llama" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(options.vocabulary, (options.micro_batch, options.length), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for number in range(WARM_UP + options.steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - start))
    return {
        "milliseconds": times,
        "gigabytes": torch.cuda.max_memory_reserved() / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


if __name__ == "__main__":
    run_script(main)
