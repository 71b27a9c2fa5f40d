"""Multi-query associative recall."""

from __future__ import annotations

import mqar
import pytest
import torch

from megatron_patch.commands.command_line import CommandError


def test_sequences_are_recall_tasks():
    task = mqar.Recall(length=64, pairs=10, vocabulary=64)
    data = task.draw(500, torch.Generator().manual_seed(0))
    inputs, positions = data.inputs
    assert inputs.shape == (500, 64) and positions.shape == data.labels.shape == (500, 10)
    rows = (part.tolist() for part in (inputs, positions, data.labels))
    for tokens, places, answers in zip(*rows, strict=True):
        keys, values = tokens[0:20:2], tokens[1:20:2]
        assert len(set(keys)) == 10 and all(1 <= key < 32 for key in keys)
        assert len(set(values)) == 10 and all(32 <= value < 64 for value in values)
        known = dict(zip(keys, values, strict=True))
        asked = dict(zip(places, answers, strict=True))
        assert len(asked) == 10
        assert all(known[tokens[place]] == label for place, label in asked.items())
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        assert all(place >= 20 and place % 2 == 0 for place in asked)
        assert all(token == 0 for place, token in enumerate(tokens[20:], 20) if place not in asked)


def test_near_queries_are_likelier():
    """The first of many draws without replacement has probability i ** (a - 1)."""
    task = mqar.Recall(length=512, pairs=1, vocabulary=64)
    data = task.draw(20_000, torch.Generator().manual_seed(0))
    slots = data.inputs[1][:, 0] // 2  # 1 is the first behind the pair
    wanted = torch.arange(1, 256).double() ** -0.99
    wanted /= wanted.sum()
    for slot in (1, 2, 10):
        share = (slots == slot).double().mean()
        deviation = (wanted[slot - 1] / 20_000) ** 0.5
        assert abs(share - wanted[slot - 1]) < 5 * deviation


def test_chosen_numbers_are_different_and_uniform():
    chosen = mqar.choose(8, (20_000, 3), torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in chosen[:1000].tolist())
    # Each ordered triple of different numbers is as likely as another: 8 * 7 * 6 of them.
    counts = torch.bincount(chosen @ torch.tensor([64, 8, 1]), minlength=512)
    seen = counts[counts > 0]
    assert len(seen) == 336
    mean = 20_000 / 336
    chi_square = ((seen - mean) ** 2 / mean).sum().item()
    assert chi_square < 335 + 5 * (2 * 335) ** 0.5


def test_recall_needs_the_convolution(command, capsys):
    with_convolution, without = command(mqar, "--tiny")
    assert with_convolution["settings"]["kernel_size"] == 2 and with_convolution["accuracy"] > 0.9
    assert without["settings"]["kernel_size"] == 1 and without["accuracy"] < 0.6
    assert "The effect is seen" in capsys.readouterr().out


def test_refusals(command):
    with pytest.raises(CommandError, match="--pairs: found 5, wanted at most a quarter"):
        command(mqar, "--tiny", "--pairs", "5")
    with pytest.raises(CommandError, match="--vocabulary: found 8, wanted an even number above 8"):
        command(mqar, "--tiny", "--vocabulary", "8")
