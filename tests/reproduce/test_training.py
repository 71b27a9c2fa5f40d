"""The training loop that the experiments share, and runs that go on where they were cut off."""

from __future__ import annotations

import math
from collections.abc import Callable

import kept
import pytest
import torch
import training
from kept import Kept
from models import LanguageModel, Sizes, build
from torch import nn
from training import IGNORED, Data, Recipe, Run, accuracy, cross_entropy, scored, train_epochs

from megatron_patch.commands.command_line import CommandError

CPU = torch.device("cpu")
DATA = scored(
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
    positions = DATA.inputs[1]
    assert positions[0].tolist() == [1, 3]
    assert DATA.labels.tolist() == [[1, 2], [3, IGNORED]]
    assert positions[1, 0] == 2
    assert accuracy(Says(0), DATA, batch=1) == pytest.approx(1 / 3)  # of labels 1, 2, 3
    loss = cross_entropy(torch.zeros(2, 2, 7), DATA.labels)
    assert loss.item() == pytest.approx(math.log(7))


def test_the_cosine_is_pytorchs():
    """Called once an epoch of three steps."""
    recipe = Recipe(1e-2, 0.0, steps=21, part=3, lowest=1e-4, by_part=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=1e-4)
    for epoch in range(7):
        for step in range(3):
            rate = recipe.learning_rate_of(3 * epoch + step)
            assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warm = Recipe(1e-2, 0.0, steps=8, warm_up=4, lowest=1e-3)
    rates = [warm.learning_rate_of(step) for step in range(9)]
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(5)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, *cosine])


def test_one_step_is_adamw_on_the_whole_model():
    """A run of one step equals the step written out, with decay on every parameter."""
    torch.manual_seed(0)
    model = LanguageModel(build("metala", Sizes(vocabulary=10, width=16)))
    torch.manual_seed(0)
    wanted = LanguageModel(build("metala", Sizes(vocabulary=10, width=16)))
    result = train_epochs(model, DATA, DATA, Recipe(1e-2, 0.5), Run(CPU), epochs=1, batch=2)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1e-2, weight_decay=0.5)
    loss = nn.functional.cross_entropy(wanted(*DATA.inputs).flatten(0, 1), DATA.labels.flatten())
    loss.backward()
    optimizer.step()
    assert result["losses"] == [pytest.approx(loss.item(), abs=1e-5)]
    assert result["steps"] == 1
    assert result["parameters"] == sum(weight.numel() for weight in wanted.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_an_epoch_has_all_examples_and_each_its_own_order():
    seen: list[list[int]] = []

    class Sees(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x[:, 0].int().tolist())
            return super().forward(x)

    data = Data((torch.arange(10.0)[:, None],), torch.zeros(10, dtype=torch.int64))
    train_epochs(Sees(1, 2), data, data, Recipe(0.1, 0.0), Run(CPU), epochs=2, batch=4)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.fixture
def run_until(monkeypatch, tmp_path) -> Callable[[float | None], tuple[dict, list]]:
    """Function: trains until a time, which goes on by 1 with each look, and returns the result and
    the weights. It goes on where the last call ended. `None` keeps nothing and has no end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(44, 3, generator=generator)
    data = Data((x,), (x[:, 0] > 0).long())
    recipe = Recipe(1e-2, decay=0.1, warm_up=8)

    def run(until: float | None) -> tuple[dict, list]:
        now = iter(range(1000))
        monkeypatch.setattr(training.time, "time", lambda: next(now))
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        end = Run(CPU) if until is None else Run(CPU, until, kept=Kept(tmp_path / "run"))
        result = train_epochs(model, data, data, recipe, end, epochs=5, batch=8)
        result.pop("seconds")
        return result, [weight.tolist() for weight in model.parameters()]

    return run


@pytest.mark.parametrize("until", [-0.5, 3.5, 6.5, 14.5])
def test_a_run_that_time_cut_off_goes_on_as_if_it_had_not(run_until, until):
    """Weights and losses are equal to the last bit, wherever it was cut: before the first step, in
    an epoch, between two, between its last step and its test."""
    wanted, weights = run_until(None)
    assert len(wanted["curve"]) == 5 and wanted["steps"] == 30
    cut, _ = run_until(until)
    assert cut["partial"] and cut["steps"] == int(until + 0.5) - len(cut["curve"])
    cut, _ = run_until(2.5)  # once more
    assert cut["partial"]
    found, ours = run_until(math.inf)
    assert found == wanted and ours == weights
    assert run_until(math.inf) == (found, ours)  # it has ended: nothing is trained


def test_a_run_stops_when_it_has_learned():
    class Knows(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([1.0, 0.0])

    data = Data((torch.zeros(4, 1),), torch.zeros(4, dtype=torch.int64))
    for threshold, epochs in ((0.99, 1), (1.0, 3)):  # above, not at
        recipe = Recipe(1e-2, 0.0, stop_above=threshold)
        result = train_epochs(Knows(1, 2), data, data, recipe, Run(CPU), epochs=3, batch=4)
        assert len(result["curve"]) == epochs and not result.get("partial")


def test_a_loss_that_is_not_finite_ends_the_run():
    class Breaks(nn.Linear):
        def forward(self, x):
            return super().forward(x) * math.nan

    data = Data((torch.zeros(4, 1),), torch.zeros(4, dtype=torch.int64))
    recipe = Recipe(1e-2, 0.0)
    result = train_epochs(Breaks(1, 2), data, data, recipe, Run(CPU), 3, 4, lambda *_: math.nan)
    assert result["curve"] == [None]
    assert result["diverged"] and result["losses"] == [None] and "partial" not in result


def test_states_are_split_and_half_written_ones_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2000)
    ours = Kept(tmp_path / "run")
    assert ours.load(CPU) is None
    Kept(tmp_path / "run-2").save(9, {"x": torch.zeros(1)})  # another run
    ours.save(5, {"x": torch.arange(1000)})
    files = sorted(tmp_path.glob("run-5-*.pt"))
    assert len(files) > 4 and max(file.stat().st_size for file in files) <= 2000
    assert torch.equal(ours.load(CPU)["x"], torch.arange(1000))
    ours.save(12, {"x": torch.ones(1000)})
    assert not any(file.exists() for file in files)
    old = {file.name: file.read_bytes() for file in tmp_path.glob("run-12-*.pt")}
    ours.save(13, {"x": torch.zeros(1000)})
    for name, data in old.items():  # as if the next state had not been written to its end
        (tmp_path / name).write_bytes(data)
    next(tmp_path.glob("run-13-2of*.pt")).unlink()
    assert torch.equal(ours.load(CPU)["x"], torch.ones(1000))
    ours.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["run-2-9-1of1.pt"]


def test_a_batch_above_the_examples_is_refused():
    with pytest.raises(CommandError, match="batch: found 3, wanted at most the 2 examples"):
        train_epochs(Says(0), DATA, DATA, Recipe(1e-2, 0.0), Run(CPU), epochs=1, batch=3)
