"""Averages of gradients on a stream of their own: who waits for whom."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from megatron_patch.neox.overlapped_reduction import OverlappedReduction

CYCLES = 20_000_000  # of the GPU's clock, some 10 ms


class Engine:
    """Stands for a DeepSpeed engine whose averages are slow: each halves its bucket."""

    def __init__(self):
        self.module = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3))).cuda()
        self.parameters = list(self.module.parameters())
        self.sums = torch.zeros(sum(p.numel() for p in self.parameters), device="cuda")
        self.optimizer = SimpleNamespace(
            bf16_groups=[self.parameters], fp32_groups_gradients_flat=[self.sums]
        )

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def average(self, sums) -> None:
        torch.cuda._sleep(CYCLES)
        sums.mul_(0.5)


def test_averages_wait_for_gradients_and_the_step_for_averages():
    engine = Engine()
    reduction = OverlappedReduction(engine, engine.parameters[0].numel(), engine.average)
    assert len(reduction.buckets) == 3
    for step in (1, 2):
        slices = engine.sums.split(engine.parameters[0].numel())
        for p, total in reversed(list(zip(engine.parameters, slices, strict=True))):
            torch.cuda._sleep(CYCLES)  # a slow backward pass
            total.fill_(step)
            reduction.note(p)
        reduction.finish()
        assert torch.equal(engine.sums.clone(), torch.full_like(engine.sums, step / 2))
        engine.sums.zero_()
