"""The needle: what is drawn, time that runs out, and --tiny."""

from __future__ import annotations

import needle
import pytest
import torch
from needle import FIRST_DIGIT, FIRST_WORD, MARK, QUERY, SENTENCE, Needle, scored

from megatron_patch.commands.command_line import CommandError


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("nearer", [True, False])
def test_what_is_drawn(repeated, nearer):
    length, digits = 40, 3
    task, generator = Needle(digits, repeated), torch.Generator().manual_seed(0)
    tokens = task.draw(4000, length, generator, nearer=nearer)
    assert tokens.shape == (4000, length)
    assert ((tokens == MARK).sum(1) == 1).all() and ((tokens == QUERY).sum(1) == 1).all()
    inputs, positions, answer = scored(tokens, digits)
    assert (inputs.gather(1, positions)[:, 0] == QUERY).all()
    places = (tokens == MARK).int().argmax(1)
    hidden = tokens.gather(1, places[:, None] + 1 + torch.arange(digits))
    assert torch.equal(hidden, answer)
    assert ((answer >= FIRST_DIGIT) & (answer < FIRST_WORD)).all()
    # Every place is used: uniformly, or near the end more often.
    free = length - 2 * (digits + 1)
    counts = places.bincount(minlength=free + 1)
    assert len(counts) == free + 1 and counts.min() > 0
    assert (counts[-1] > 5 * counts[0]) == nearer
    # The rest is words: the one sentence again and again, or other words in each sequence.
    is_word = tokens >= FIRST_WORD
    assert (is_word.sum(1) == length - 2 * (digits + 1)).all()
    sentence = FIRST_WORD + torch.arange(length) % SENTENCE
    assert (tokens == sentence).sum() == is_word.sum() if repeated else is_word.sum() / 10


def test_a_run_that_time_cut_off_is_told_and_goes_on(command):
    small = "--tiny --model metala --steps 4 --test-examples 4".split()
    (cut,) = command(needle, *small, "--minutes", "1e-4")
    assert cut["partial"] and cut["steps"] < 4 and cut["accuracy"] is None
    _, whole = command(needle, *small)
    assert "partial" not in whole and whole["steps"] == 4 and set(whole["accuracies"]) == {"32"}


def test_memory_finds_the_needle(command):
    runs = command(needle, "--tiny")
    found = {run["settings"]["model"]: run["accuracies"]["32"] for run in runs}
    assert min(found["metala"], found["hybrid"]) >= 0.9
    assert found["window"] <= 0.4


def test_a_needle_that_does_not_fit(command):
    with pytest.raises(CommandError, match="--digits: found 9, wanted a needle"):
        command(needle, "--tiny", "--digits", "9")
