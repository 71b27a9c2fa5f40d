"""The decoding benchmark runs on the CPU with tiny models."""

import re

import benchmark_generate as benchmark
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM


def test_on_the_cpu(run_command, tmp_path):
    options = "--device cpu --size tiny --batches 1 2 --contexts 24 8 --steps 2 --plot".split()
    picture = tmp_path / "speed.png"
    result = run_command("benchmarks/benchmark_generate.py", *options, picture)
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^ +(\d+) +(\d+) \| +(\d+) .* \| +(\d+) .* \| +([\d.]+)x", result.stdout, re.M
    )
    assert [row[:2] for row in rows] == [("1", "8"), ("1", "24"), ("2", "8"), ("2", "24")]
    for *_, ours, theirs, ratio in rows:
        assert float(ratio) == pytest.approx(int(ours) / int(theirs), rel=0.1)
    assert len(re.findall(r"\d%$", result.stdout, re.M)) == 2  # of the roofline, at batch 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_steps_that_are_timed():
    """LLaMA attends to a full context of the stated length, and MetaLA has read as much."""

    shape = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=benchmark.VOCABULARY,
    )  # fmt: skip
    device = torch.device("cpu")
    llama = benchmark.build(LlamaForCausalLM, LlamaConfig(**shape), device)
    seen = []
    llama.model.register_forward_hook(
        lambda m, i, out: seen.append(int(out.past_key_values.layers[0].cumulative_length))
    )
    with torch.no_grad():
        benchmark.llama_speed(llama, 2, 40, 3, device, lambda: False)
    assert seen == list(range(41, 41 + benchmark.WARM_UP_STEPS + 3))

    metala = benchmark.build(MetaLAForCausalLM, MetaLAConfig(**shape), device)
    read = []
    metala.model.register_forward_hook(
        lambda m, i, out: read.append(out.past_key_values.get_seq_length())
    )
    with torch.no_grad():
        for context, _ in zip(
            (10, 40), benchmark.metala_speeds(metala, 2, [10, 40], 3, device, None), strict=True
        ):
            assert context + benchmark.WARM_UP_STEPS + 3 == read[-1]
    weights = sum(p.nbytes for p in metala.parameters())
    assert benchmark.bytes_read(metala) == weights - 2 * 16 * benchmark.VOCABULARY
