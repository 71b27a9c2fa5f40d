"""The training loop and the sweeps that the experiments share."""

from __future__ import annotations

import functools
import json
import math
import time

import pytest
import torch
from models import Sizes, build
from torch import nn
from training import (
    IGNORED,
    Recipe,
    Sequences,
    accuracy,
    cross_entropy,
    read_runs,
    sweep,
    train,
)

from megatron_patch.commands.command_line import CommandError

DATA = Sequences(
    torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]),
    torch.tensor([[IGNORED, 1, IGNORED, 2], [IGNORED, IGNORED, 3, IGNORED]]),
)


class Says(nn.Module):
    """Says the token that it reads, plus `more`."""

    def __init__(self, more: int):
        super().__init__()
        self.more = more

    def forward(self, tokens, positions):
        return nn.functional.one_hot(tokens.gather(1, positions) + self.more, 10).float()


def test_only_labelled_positions_are_scored():
    positions, labels = DATA.scored()
    assert positions[0].tolist() == [1, 3]
    assert labels.tolist() == [[1, 2], [3, IGNORED]]
    assert positions[1, 0] == 2
    assert accuracy(Says(0), DATA, batch_size=1) == pytest.approx(1 / 3)  # of labels 1, 2, 3
    loss = cross_entropy(torch.zeros(2, 2, 7), labels)
    assert loss.item() == pytest.approx(math.log(7))


def test_the_cosine_is_pytorchs():
    recipe = Recipe(1e-2, epochs=7, batch_size=1, weight_decay=0.0, min_learning_rate=1e-4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=1e-4)
    for epoch in range(7):
        assert recipe.learning_rate_of(0, epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warm = Recipe(1e-2, epochs=7, batch_size=1, weight_decay=0.0, warm_up=4)
    assert [warm.learning_rate_of(step, 0) for step in range(5)] == pytest.approx(
        [0.0025, 0.005, 0.0075, 0.01, 0.01]
    )


def test_one_step_is_adamw_on_the_whole_model():
    """A run of one step equals the step written out, with decay on every parameter."""
    torch.manual_seed(0)
    model = build("metala", Sizes(vocabulary=10, width=16))
    torch.manual_seed(0)
    wanted = build("metala", Sizes(vocabulary=10, width=16))
    recipe = Recipe(1e-2, epochs=1, batch_size=2, weight_decay=0.5)
    result = train(model, DATA, DATA, recipe, torch.device("cpu"))
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1e-2, weight_decay=0.5)
    logits = wanted(DATA.inputs, torch.arange(4).expand(2, 4))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), DATA.labels.flatten())
    loss.backward()
    optimizer.step()
    assert result["losses"] == [pytest.approx(loss.item(), abs=1e-5)]
    assert result["steps"] == 1
    for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_run_goes_on_where_time_cut_it_off(tmp_path):
    recipe = Recipe(1e-2, epochs=3, batch_size=1, weight_decay=0.0)

    def run(model: nn.Module, **arguments) -> dict:
        return train(model, DATA, DATA, recipe, torch.device("cpu"), **arguments)

    def new() -> nn.Module:
        torch.manual_seed(1)
        return build("metala", Sizes(vocabulary=10, width=16))

    whole = run(new())

    class Slow(nn.Module):
        """Ends the time in the middle of the second epoch."""

        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, *args):
            self.calls += self.training
            if self.calls == 3:
                time.sleep(3)
            return self.model(*args)

    checkpoint = tmp_path / "run.pt"
    slow = Slow(new())
    cut = run(slow, until=time.time() + 2.5, checkpoint=checkpoint)
    assert cut["partial"] and len(cut["losses"]) == 1 and checkpoint.exists()
    rest = run(Slow(new()), checkpoint=checkpoint)
    assert rest["losses"] == whole["losses"] and rest["accuracies"] == whole["accuracies"]
    assert rest["steps"] == whole["steps"] and "partial" not in rest
    assert not checkpoint.exists()


def square(case: dict, until: float, offset: int = 0) -> dict:
    """A run for the sweeps below."""
    if case.get("slow") and until < math.inf:
        return {"accuracy": None, "partial": True}
    return {"accuracy": case["x"] ** 2 + offset}


def test_a_sweep_runs_what_is_missing(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    cases = [{"x": x} for x in range(3)]
    sweep(path, cases[:2], square)
    runs = sweep(path, cases, functools.partial(square, offset=100))
    assert [run["accuracy"] for run in runs] == [0, 1, 104]
    assert len(read_runs(path)) == 3
    assert set(runs[0]) == {"settings", "accuracy", "command", "card", "date", "commit", "torch"}
    # A run that time cut off is kept as such, is no result, and is run again.
    slow = [{"x": 5, "slow": True}]
    assert sweep(path, slow, square, minutes=1) == []
    assert read_runs(path)[-1]["partial"]
    assert [run["accuracy"] for run in sweep(path, slow, square)] == [25]
    assert sweep(path, [{"x": 9}], square, minutes=-1) == []  # no time to begin
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(CommandError, match=r"runs\.jsonl:6: wanted a run"):
        sweep(path, cases, square)


def test_runs_go_side_by_side(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = sweep(path, [{"x": x} for x in range(4)], square, jobs=2)
    assert [run["accuracy"] for run in runs] == [0, 1, 4, 9]
    assert sorted(json.loads(line)["accuracy"] for line in path.open()) == [0, 1, 4, 9]
