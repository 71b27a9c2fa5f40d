"""MAD's six tasks."""

from __future__ import annotations

import random

import mad
import pytest
import torch
from models import LanguageModel, Sizes, build
from torch import nn
from training import IGNORED, Data


def rows(task: str, training: bool, count: int = 200, **settings) -> list:
    """Returns the tokens and labels of `count` sequences."""
    case = mad.TASKS[task][1] | settings | dict(task=task, seed=3)
    data = mad.draw(case, count, training)
    inputs, positions = data.inputs
    assert inputs.min() >= 0 and inputs.max() < case["vocabulary"]
    labels = torch.full_like(inputs, IGNORED).scatter_(1, positions, data.labels)
    return list(zip(inputs.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("task", mad.TASKS)
def test_training_and_test_differ(task):
    training = {tuple(tokens) for tokens, _ in rows(task, True)}
    assert len(training) == 200
    assert not training & {tuple(tokens) for tokens, _ in rows(task, False)}


def test_compression_keeps_all():
    for tokens, labels in rows("compression", False):
        assert tokens == labels and len(tokens) == 32
        assert tokens[-1] == 15 and max(tokens[:-1]) < 15


def test_memorization_has_one_map():
    known: dict[int, int] = {}
    for tokens, labels in rows("memorization", True) + rows("memorization", False):
        assert set(tokens[1::2]) == {255} and set(labels[0::2]) == {IGNORED}
        for key, value in zip(tokens[0::2], labels[1::2], strict=True):
            assert key < 127 <= value < 255
            assert known.setdefault(key, value) == value
    assert len(known) == len(set(known.values())) == 127


@pytest.mark.parametrize("task", ["in-context", "noisy"])
def test_recall_scores_what_is_known(task):
    """An oracle that remembers pairs gives every label of the test."""
    noise = count = 0
    for tokens, labels in rows(task, False):
        assert len(tokens) == 127 and labels[-1] != IGNORED
        known: dict[int, int] = {}
        for place in range(0, 127, 2):
            key, label = tokens[place], labels[place]
            if key >= 16:
                noise += 1
                assert label == IGNORED and tokens[place + 1] >= 16
                continue
            assert key < 8
            assert label == known.get(key, IGNORED)
            if place < 126:
                assert known.setdefault(key, tokens[place + 1]) == tokens[place + 1]
                assert labels[place + 1] == IGNORED
            count += 1
    assert noise / (noise + count) == pytest.approx(0.2 if task == "noisy" else 0.0, abs=0.02)
    # Training predicts each next token of the same kind of sequence.
    for tokens, labels in rows(task, True):
        assert labels[:-1] == tokens[1:]


def test_fuzzy_keys_and_values_have_several_tokens():
    """Splits test sequences, whose keys have three tokens, into pairs and recalls by them."""
    sizes = set()
    for tokens, labels in rows("fuzzy", False):
        assert len(tokens) == 128
        place = tokens.count(15)
        assert set(tokens[:place]) <= {15} and place < 18
        known: dict[tuple, tuple] = {}
        while place < len(tokens):
            key = tuple(tokens[place : place + 3])
            assert len(set(key)) == 3 and max(key) < 7
            place += 3
            # The last token of the last value is a label alone.
            rest = [*tokens[place:], labels[-1]]
            size = next((i for i, token in enumerate(rest) if token < 7), len(rest))
            value = tuple(rest[:size])
            sizes.add(size)
            wanted = [IGNORED] * size
            if key in known:
                wanted = list(known[key])
                assert value == known[key]
            assert labels[place - 1 : place - 1 + size] == wanted
            known[key] = value
            place += size
        assert wanted[0] != IGNORED  # the last key was there before
    assert sizes == {1, 2, 3}
    assert all(labels[:-1] == tokens[1:] for tokens, labels in rows("fuzzy", True))


def test_copy_repeats_what_stood_between_blanks():
    for tokens, labels in rows("copy", False):
        assert len(tokens) == 256 and tokens[239] == 15 and tokens[238] < 14
        assert [token for token in tokens[:239] if token != 14] == labels[240:]
        assert set(tokens[240:]) == {14} and set(labels[:240]) == {IGNORED}


def test_accuracy_is_the_mean_over_tokens():
    """By hand, in batches of one. The first: token 0 twice, one of them right; token 1 once, right;
    2 said but not there. The second: 3 alone, right."""

    class Says(nn.Module):
        def forward(self, tokens, positions):
            return nn.functional.one_hot(tokens.gather(1, positions), 4).float()

    labels = torch.tensor([[0, 0, 1, IGNORED], [3, IGNORED, IGNORED, IGNORED]])
    tokens = torch.tensor([[0, 2, 1, 3], [3, 0, 0, 0]])
    data = Data((tokens, torch.arange(4).expand(2, 4)), labels)
    wanted = ((0.5 + 1 + 0) / 3 + 1) / 2
    assert mad.macro_accuracy(Says(), data, 1, 4) == pytest.approx(wanted)
    together = (0.5 + 1 + 0 + 1) / 4
    assert mad.macro_accuracy(Says(), data, 2, 4) == pytest.approx(together)


def test_the_decoder_reads_the_last_hidden_state_alone():
    torch.manual_seed(0)
    model = LanguageModel(build("metala", Sizes(vocabulary=8, width=16)), tied=False)
    model = mad.Compressing(model, length=6)
    tokens, places = torch.randint(8, (2, 6)), torch.arange(6).expand(2, 6)
    logits = model(tokens, places)
    assert logits.shape == (2, 6, 8)
    reverse = model(tokens, places.flip(1))
    torch.testing.assert_close(logits.flip(1), reverse)  # a position alone tells them apart
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3


def test_the_benchmark_has_396_runs():
    assert len(mad.EXPERIMENT.cases(mad.PAPER)) == 36
    cases = mad.EXPERIMENT.cases(mad.PAPER | dict(all=True))
    assert len(cases) == len({str(case) for case in cases}) == 396
    rng = random.Random(0)
    for case in cases:  # each can be drawn
        tokens, labels = mad.TASKS[case["task"]][0](rng, case, True)
        assert len(tokens) == len(labels)


def test_copying_needs_the_recurrence(command, capsys):
    remembers, forgets = command(mad, "--tiny")
    assert remembers["settings"]["model"] == "metala" and remembers["accuracy"] > 0.9
    assert forgets["settings"]["model"] == "window" and forgets["accuracy"] < 0.6
    assert "The effect is seen" in capsys.readouterr().out
