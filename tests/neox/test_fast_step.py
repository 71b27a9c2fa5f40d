"""When layers are captured, and which boundaries of documents their replays read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.neox.cuda_graphs import WARM_UP, LayerGraphs
from megatron_patch.neox.fast_step import time_only_where_asked, why_no_graphs

RUN = dict(
    metala={},
    model_parallel_size=1,
    pipe_parallel_size=0,
    checkpoint_activations=False,
    hidden_dropout=0.0,
    train_impl="normal",
    zero_optimization={"stage": 1},
    log_gradient_noise_scale=False,
)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"metala": {"cuda_graphs": "never"}}, "metala.cuda_graphs"),
        (
            {"model_parallel_size": 2, "metala": {"context_parallel_size": 2}},
            "model_parallel_size and metala.context_parallel_size",
        ),
        ({"pipe_parallel_size": 2}, "pipe_parallel_size"),
        ({"checkpoint_activations": True}, "checkpoint_activations"),
        ({"hidden_dropout": 0.1}, "hidden_dropout"),
        ({"train_impl": "dpo"}, "train_impl"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization offloads"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization offloads",
        ),
        ({"log_gradient_noise_scale": True}, "log_gradient_noise_scale"),
    ],
)
def test_the_setting_that_prevents_graphs_is_named(changes, key):
    assert why_no_graphs(SimpleNamespace(**RUN | changes)).startswith(key)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metala": {"reset_at_document": True}},
        {"metala": {"context_parallel_size": 2}},
        {"model_parallel_size": 2},
        {"pipe_parallel_size": 1},
        {"zero_optimization": {"stage": 2}},
        {"metala": None},
    ],
)
def test_layers_are_captured_otherwise(changes):
    assert why_no_graphs(SimpleNamespace(**RUN | changes)) is None


class _Graph:
    """Stands for a captured layer: gives the boundaries that a replay would read."""

    def __init__(self, graphs: LayerGraphs):
        self.graphs, self.is_busy = graphs, False

    def has_moved(self) -> bool:
        return False

    def fits(self, x) -> bool:
        return not self.is_busy

    def __call__(self, x) -> list[int]:
        return self.graphs.captured.tolist()


def test_graphs_replay_with_the_boundaries_of_their_own_micro_batch():
    lines = []
    graphs = LayerGraphs([None] * 2, None, lines.append)
    graphs.passes, graphs.room, graphs.captured = WARM_UP, 3, torch.zeros(4, dtype=torch.int32)
    graphs.graphs = [_Graph(graphs) for _ in range(2)]
    x = torch.zeros(1, requires_grad=True)

    def run(*bounds) -> list:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if bounds else None
        return [graphs.run(index, x, cu_seqlens) for index in range(2)]

    assert run(0, 5, 8) == [[0, 5, 8, 8]] * 2  # an empty document fills the room
    assert run(0, 8) == [[0, 8, 8, 8]] * 2
    assert run(0, 1, 2, 3, 8) == [None, None]
    assert run(0, 1, 2, 3, 8) == [None, None]
    assert len(lines) == 1 and "room for 3 documents a micro-batch; those with more" in lines[0]
    assert run() == [None, None]
    graphs.graphs[1].is_busy = True  # its backward pass will read the boundaries
    assert run(0, 2, 8) == [None, None]
    assert graphs.captured.tolist() == [0, 8, 8, 8]
    graphs.graphs[1].is_busy = False
    assert run(0, 2, 8) == [[0, 2, 8, 8]] * 2


def test_a_rank_replays_only_where_the_others_do():
    """NCCL wants all ranks of a captured collective to launch its graph, or none."""
    others = []  # what another rank votes, micro-batch by micro-batch
    votes = []

    def decide(*own):
        votes.append(own)
        return [a and b for a, b in zip(own, others.pop(0), strict=True)]

    graphs = LayerGraphs([None] * 2, None, lambda line: None, decide)
    graphs.captured = torch.zeros(4, dtype=torch.int32)
    graphs.graphs = [_Graph(graphs) for _ in range(2)]
    x = torch.zeros(1, requires_grad=True)
    given = torch.tensor([0, 8], dtype=torch.int32)

    def run() -> bool:
        found = {graphs.run(index, x, given) is not None for index in range(2)}
        assert len(found) == 1  # all layers or none
        return found.pop()

    assert [run() for _ in range(WARM_UP)] == [False] * WARM_UP and not votes
    others += [(True, True, True), (True, False, True), (True, True, False), (True, True, True)]
    assert [run() for _ in range(4)] == [True, False, False, True]
    assert votes == [(True, True, True)] * 4
    with torch.no_grad():
        assert not run()  # validation, for which no rank votes
    captures = []
    graphs._capture = lambda *given: captures.append(given)
    others += [(False, True, True)]  # a parameter of the other rank has moved
    assert not run() and len(captures) == 1  # both capture anew


@pytest.mark.parametrize("is_timed", [True, False])
def test_a_step_is_timed_only_where_asked(monkeypatch, is_timed):
    """DeepSpeed's timer waits for the device at both ends of a step."""
    timer = pytest.importorskip("deepspeed.utils.timer")
    waits = []
    monkeypatch.setattr(
        timer, "get_accelerator", lambda: SimpleNamespace(synchronize=lambda: waits.append(1))
    )
    config = SimpleNamespace(enabled=True, synchronized=True)
    engine = SimpleNamespace(tput_timer=timer.ThroughputTimer(config, batch_size=1, start_step=0))
    time_only_where_asked(engine, SimpleNamespace(wall_clock_breakdown=is_timed))
    engine.tput_timer.start()
    engine.tput_timer.stop(global_step=True)
    assert len(waits) == (2 if is_timed else 0)
    assert engine.tput_timer.total_elapsed_time > 0
