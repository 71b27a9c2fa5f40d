"""Averages of gradients during the backward pass give the bits of those after it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_patch.neox import overlapped_reduction
from megatron_patch.neox.overlapped_reduction import (
    OverlappedReduction,
    average_over_ranks,
    why_no_overlap,
)
from tests.neox.training import neox

RUN = dict(
    zero_optimization={"stage": 1, "overlap_comm": True},
    pipe_parallel_size=0,
    model_parallel_size=2,
    sequence_parallel=False,
)
# train.py, which also prints how many buckets were under way when the backward pass ended.
TRAIN = """
import os, runpy
from megatron_patch.neox.overlapped_reduction import OverlappedReduction

finish = OverlappedReduction.finish

def tell(self):
    os.write(1, b"buckets %d of %d\\n" % (self.started, len(self.buckets)))
    finish(self)

OverlappedReduction.finish = tell
runpy.run_path("train.py", run_name="__main__")
"""


class Engine:
    """Stands for a DeepSpeed engine: two groups of parameters, and averages that are noted."""

    def __init__(self):
        self.module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 5))
        weights = [layer.weight for layer in self.module]
        biases = [layer.bias for layer in self.module]
        groups = [weights, biases]
        sums = [torch.zeros(sum(p.numel() for p in group) + 1) for group in groups]
        self.optimizer = SimpleNamespace(bf16_groups=groups, fp32_groups_gradients_flat=sums)
        self.is_last, self.averaged = True, []

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.is_last


@pytest.fixture
def engine(monkeypatch) -> Engine:
    def average(engine, sums) -> None:
        engine.averaged.append(sums.numel())
        sums.mul_(0.5)

    monkeypatch.setattr(overlapped_reduction, "average_over_ranks", average)
    return Engine()


def test_buckets_start_in_the_order_of_the_backward_pass(engine):
    reduction = OverlappedReduction(engine, 15)
    first, second, third = engine.module
    for sums in engine.optimizer.fp32_groups_gradients_flat:
        sums += 1
    engine.is_last = False
    for p in engine.module.parameters():  # the micro-batches before the last
        reduction.note(p)
    assert engine.averaged == []
    engine.is_last = True
    reduction.note(second.weight)  # early: its bucket waits for the ones before it
    reduction.note(third.bias)
    assert engine.averaged == []
    reduction.note(third.weight)
    assert engine.averaged == [20]
    reduction.note(second.bias)
    reduction.note(first.weight)
    assert engine.averaged == [20]  # the biases lie in one bucket
    reduction.note(first.bias)
    assert engine.averaged == [20, 11, 14]
    reduction.finish()
    weights, biases = engine.optimizer.fp32_groups_gradients_flat
    assert weights.tolist() == [0.5] * 34 + [1.0] and biases.tolist() == [0.5] * 11 + [1.0]


def test_the_end_averages_what_got_no_gradient_and_begins_anew(engine):
    reduction = OverlappedReduction(engine, 1)
    for step in range(1, 3):
        for p in engine.module[1:].parameters():
            reduction.note(p)
        assert len(engine.averaged) == 6 * step - 2
        reduction.finish()
        assert len(engine.averaged) == 6 * step


def test_a_gradient_after_its_average_is_an_error(engine):
    reduction = OverlappedReduction(engine, 1)
    reduction.note(engine.module[2].bias)
    with pytest.raises(RuntimeError, match=r"overlap_comm: found two gradients .* \[5\]"):
        reduction.note(engine.module[2].bias)


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize(("postscales", "divisor"), [(True, 1.0), (True, 2.0), (False, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_deepspeeds(monkeypatch, averages, postscales, divisor, dtype):
    """Of four ranks with equal sums, in whole numbers, which no step rounds."""
    deepspeed = pytest.importorskip("deepspeed.runtime.engine")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(4))
    monkeypatch.setattr(deepspeed.dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(deepspeed.dist, "all_reduce", lambda tensor, group: tensor.mul_(4))
    engine = SimpleNamespace(
        gradient_average=averages,
        postscale_gradients=lambda: postscales,
        gradient_predivide_factor=lambda: divisor,
        communication_data_type=dtype,
        seq_data_parallel_group=None,
        flatten=lambda bucket: bucket[0].clone(),
    )
    sums = torch.arange(-8.0, 9.0)
    wanted = deepspeed.DeepSpeedEngine.allreduce_bucket(engine, [sums], None)
    average_over_ranks(engine, sums)
    assert torch.equal(sums, wanted) and sums.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": None}, "zero_optimization.overlap_comm"),
        ({"pipe_parallel_size": 1}, "pipe_parallel_size"),
        ({"sequence_parallel": True}, "sequence_parallel"),
    ],
)
def test_the_setting_that_prevents_it_is_named(changes, key):
    assert why_no_overlap(SimpleNamespace(**RUN)) is None
    assert why_no_overlap(SimpleNamespace(**RUN | changes)).startswith(key)


def test_weights_of_two_ranks_are_those_without_it(neox_checkout, config, tmp_path):
    """With tied embeddings, whose gradient comes from both ends of the model."""
    program = tmp_path / "train_and_tell.py"
    program.write_text(TRAIN)
    weights, losses = [], []
    for overlaps in (False, True):
        folder = tmp_path / str(overlaps)
        changes = dict(
            num_gpus=2,
            precision="bfloat16",
            data_types={"grad_accum_dtype": "fp32"},
            no_weight_tying=False,
            gradient_accumulation_steps=2,
            train_batch_size=None,
            train_iters=3,
            checkpoint_factor=3,
            save=str(folder / "checkpoints"),
            zero_optimization={
                "stage": 1,
                "overlap_comm": overlaps,
                "reduce_bucket_size": 10_000,
            },
        )
        run = neox(neox_checkout, str(program), config | changes, folder)
        assert run.returncode == 0, run.output[-3000:]
        told = re.findall(r"buckets (\d+) of (\d+)", run.output)
        assert len(told) == (6 if overlaps else 0)  # three steps on two ranks
        assert all(started == count and int(count) > 4 for started, count in told)
        (file,) = folder.glob("checkpoints/global_step3/mp_rank_00_model_states.pt")
        weights.append(torch.load(file, weights_only=False)["module"])
        losses.append(run.losses)
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    for name, tensor in weights[0].items():
        assert tensor is None or torch.equal(tensor, weights[1][name]), name
