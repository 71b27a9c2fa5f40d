"""ListOps: expressions and their values, the published files, a run that goes on, and --tiny."""

from __future__ import annotations

import itertools
import random
import statistics

import lra
import pytest
import torch
from classifier import PAD
from listops_data import END, TOKENS, Shape, draw, draw_expression, evaluate, read_tsv

from megatron_patch.commands.command_line import CommandError


def tokens_of(text: str) -> list[int]:
    return [TOKENS.index(word) for word in text.split()]


def by_python(tokens: list[int]) -> int:
    """Returns the value of an expression, computed by Python's own `eval`."""
    calls = {"[MIN": "min([", "[MAX": "max([", "[MED": "median([", "[SM": "sum_mod(["}
    text = " ".join(calls.get(word, "])," if word == "]" else f"{word},")
                    for word in (TOKENS[token] for token in tokens))  # fmt: skip
    names = dict(median=lambda x: int(statistics.median(x)), sum_mod=lambda x: sum(x) % 10)
    (value,) = eval(text, {"min": min, "max": max, **names})
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 0 ]", 4),
        ("[MED 1 9 4 ]", 4),
        ("[MED 1 9 4 3 ]", 3),  # 3.5, rounded down
        ("[SM 9 8 7 ]", 4),
        ("[MIN [SM 5 5 ] [MAX 0 7 ] ]", 0),
    ],
)
def test_values(text, value):
    assert evaluate(tokens_of(text)) == by_python(tokens_of(text)) == value


@pytest.mark.parametrize("text", ["", "[MAX ]", "4 ]", "[MAX 1 2", "[MIN 1 2 ] 3"])
def test_what_is_no_expression(text):
    with pytest.raises(ValueError):
        evaluate(tokens_of(text))


@pytest.mark.parametrize("shape", [Shape(), Shape(4, 3, 8, 20)])
def test_drawn_expressions(shape):
    rng = random.Random(0)
    for _ in range(20):
        tokens, value = draw_expression(shape, rng)
        assert shape.shortest <= len(tokens) <= shape.longest
        assert by_python(tokens) == evaluate(tokens) == value
        steps = [(1 <= x <= 4) - (x == END) for x in tokens]
        assert max(itertools.accumulate(steps)) < shape.depth
        counts, open_ones = [], []
        for token in tokens:
            if 1 <= token <= 4:
                open_ones.append(0)
            elif token == END:
                counts.append(open_ones.pop())
                if open_ones:
                    open_ones[-1] += 1
            else:
                open_ones[-1] += 1
        assert 2 <= min(counts) and max(counts) <= shape.arguments


def test_a_seed_gives_the_same_expressions():
    shape = Shape(3, 4, 5, 12)
    first, more, other = draw(shape, 30, 0, 1), draw(shape, 501, 0, 2), draw(shape, 30, 1, 1)
    assert all(torch.equal(a, b[:30]) for a, b in zip(first, more, strict=True))
    assert not torch.equal(first[0], other[0])


def test_published_files(tmp_path):
    file = tmp_path / "basic_test.tsv"
    line = "( ( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) 1 ) ] )\t4\n"
    file.write_text("Source\tTarget\n" + line + "( ( ( [SM 9 ) 8 ) ] )\t7\n")
    tokens, values = read_tsv(file)
    assert tokens[0].tolist() == tokens_of("[MAX 4 [MIN 2 3 ] 1 ]")
    assert tokens[1].tolist() == tokens_of("[SM 9 8 ]") + 4 * [PAD]
    assert values.tolist() == [4, 7]
    file.write_text(line.replace("\t4", "\t5"))
    with pytest.raises(CommandError, match="basic_test.tsv:1: found the value 5, wanted 4"):
        read_tsv(file)
    file.write_text(line + "[MAX 3\t3\n")
    with pytest.raises(CommandError, match="basic_test.tsv:2: wanted an expression"):
        read_tsv(file)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    case = {**lra.PAPER, **lra.TINY, "task": "listops", "model": "metala", "kernel_size": 4}
    model = lra.new_model(case).double().eval()
    inputs = torch.tensor([tokens_of("[MAX 4 3 [MIN 2 3 ] 1 0 ]")])
    padded = torch.nn.functional.pad(inputs, (0, 7), value=PAD)
    with torch.no_grad():
        wanted, found = model(inputs), model(padded)
    assert torch.allclose(wanted, found, rtol=1e-12, atol=1e-12)


def test_pairs_are_read_each_for_itself():
    torch.manual_seed(0)
    case = {**lra.PAPER, **lra.TINY, "task": "retrieval", "model": "metala"}
    model = lra.new_model(case).double().eval()
    pairs = torch.randint(1, 257, (3, 2, 10))
    body, head = model.body, model.head
    with torch.no_grad():
        x, y = (body(pairs[:, side])[0].mean(1) for side in range(2))
        wanted = head(torch.cat([x, y, x * y, x - y], 1))
        assert torch.allclose(model(pairs), wanted, rtol=1e-12, atol=1e-12)


def test_memory_matters(command, capsys):
    runs = command(lra, "--tiny")
    with_memory, without = (run["accuracy"] for run in runs)
    assert with_memory > without + lra.MARGIN and without > runs[0]["majority"]
    assert "The effect is seen" in capsys.readouterr().out
    again = command(lra, "--tiny")  # nothing is left to run
    assert again == runs


def test_effect_that_is_missing_is_an_error():
    runs = [{"settings": {"model": name}, "accuracy": 0.5} for name in ("metala", "window")]
    with pytest.raises(CommandError, match="metala: 0.5, window: 0.5: wanted MetaLA ahead"):
        lra.EXPERIMENT.show_effect(runs)


def test_refusals(command):
    with pytest.raises(CommandError, match="--data: found none, wanted the folder of text"):
        command(lra, "--task", "text")
    with pytest.raises(CommandError, match="--shortest: found 9, wanted at most --longest"):
        command(lra, "--tiny", "--shortest", "9")
