#!/usr/bin/env python3
"""Times training steps of a LLaMA in a bare loop: transformers, SDPA, torch.compile, fused AdamW.

    python scripts/benchmarks/llama_step.py --layers 24 --width 1024 --heads 8 --mlp 2816 \\
        --length 2048 --micro-batch 8

is what benchmark_training.py runs beside GPT-NeoX: the strongest softmax attention of equal size
that PyTorch gives, without a framework's costs. Weights and optimizer are float32, products
bfloat16 by autocast. Prints JSON: the milliseconds of each step, GB reserved, parameters.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from megatron_patch.commands.command_line import CommandError, Parser, run_script, whole

WARM_UP = 5


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 24), ("width", 1024), ("heads", 8), ("mlp", 2816), ("vocabulary", 32_000),
        ("length", 2048), ("micro-batch", 8), ("steps", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=whole(1), default=default, help=f"default: {default}")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise CommandError("found no CUDA device, wanted one")
    print(json.dumps(measure(options)), flush=True)


def measure(options) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.length,
        use_cache=False,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).cuda()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(options.vocabulary, (options.micro_batch, options.length), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
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
