"""The benchmark of layouts gives each GPU as many tokens a step as one GPU has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts/benchmarks"


def test_layouts_are_compared_at_equal_tokens_a_gpu(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import benchmark_parallel
    from benchmark_training import Measurement

    trained = []

    def measure(checkout, settings, folder, name):
        trained.append(settings)
        tokens = settings["train_batch_size"] * settings["seq_length"]
        return Measurement([100.0], tokens / 0.1, 10.0, 1)

    monkeypatch.setattr(benchmark_parallel, "measure", measure)
    monkeypatch.setattr(benchmark_parallel, "need_linked_neox", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    benchmark_parallel.main([])

    shares = re.findall(r"([\d.]+)%", capsys.readouterr().out)
    assert list(map(float, shares)) == [100.0] * 5  # all took 100 ms for as many tokens a GPU
    found = [
        (
            one["num_gpus"],
            one["model_parallel_size"],
            one["sequence_parallel"],
            one["metala"]["context_parallel_size"],
            one["train_micro_batch_size_per_gpu"],
            one["train_batch_size"],
        )
        for one in trained
    ]
    assert found == [
        (1, 1, False, 1, 8, 8),
        (2, 1, False, 1, 8, 16),
        (2, 1, False, 2, 16, 16),
        (2, 2, False, 1, 16, 16),
        (2, 2, True, 1, 16, 16),
    ]
    with pytest.raises(SystemExit):
        benchmark_parallel.main(["--gpus", "3"])
