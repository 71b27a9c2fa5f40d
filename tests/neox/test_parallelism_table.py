"""The table of docs/parallelism.md is complete, and a sample of it is still true."""

from __future__ import annotations

import pytest

from tests.neox.parallelism_table import (
    PAGE,
    Bench,
    Combination,
    Outcome,
    cells,
    combinations,
    render,
    written,
)

SAMPLE = [
    Combination(data=2, zero=3, hybrid=True),
    Combination(data=2, zero=2, recompute=True),
    Combination(tensor=2, zero=1, hybrid=True, recompute=True),
    Combination(tensor=2, pipeline=2, sequence=True, zero=1),
    Combination(pipeline=2, context=2, documents=True),
]
REFUSED = [
    Combination(tensor=2, zero=2),
    Combination(pipeline=2, zero=3, recompute=True),
    Combination(context=2, hybrid=True),
]


def layouts(table: str) -> dict:
    return {key: row for key, row in cells(table).items() if all(row)}


def test_every_combination_stands_in_the_table_and_none_failed():
    _, table, _ = written(PAGE.read_text())
    wanted = {
        (c.documents, c.tensor, c.pipeline, c.data, c.context, c.sequence) for c in combinations()
    }
    assert layouts(table).keys() == wanted
    assert "FAILED" not in table
    letters = {line[4] for line in table.splitlines() if line.startswith("- **")}
    words = {word for row in layouts(table).values() for cell in row for word in cell.split()}
    assert {word for word in words if word.isalpha() and len(word) == 1} == letters


def test_a_cell_tells_its_four_combinations_apart():
    outcomes = {c: Outcome("passed", 1e-7, 2e-8) for c in combinations()}
    outcomes[Combination(hybrid=True)] = Outcome("refused", line="norm: found 2, wanted 1")
    outcomes[Combination(zero=1)] = Outcome("FAILED", 0.5, 2e-8)
    for recompute in (False, True):
        hybrid = Combination(zero=3, hybrid=True, recompute=recompute)
        outcomes[hybrid] = Outcome("refused", line="norm: found 3, wanted 1")
    first = cells(render(outcomes))[(False, 1, 0, 1, 1, False)]
    assert first[0] == (
        "MetaLA: 1e-07 / 2e-08; hybrid: a; MetaLA, recomputed: 1e-07 / 2e-08; "
        "hybrid, recomputed: 1e-07 / 2e-08"
    )
    assert "**FAILED** 5e-01 / 2e-08" in first[1]
    assert first[2:] == ["1e-07 / 2e-08", "1e-07 / 2e-08; hybrid a"]
    assert "- **a**: `norm: found 2, wanted 1`" in render(outcomes)


@pytest.fixture(scope="module")
def bench(neox_checkout, tokenizer_file, tmp_path_factory):
    return Bench(neox_checkout, tokenizer_file, tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("combination", SAMPLE, ids=str)
def test_a_combination_equals_one_rank(bench, combination):
    outcome = bench.outcome(combination)
    assert outcome.kind == "passed", outcome


def test_others_are_refused_at_the_start(bench):
    assert bench.refusals(SAMPLE + REFUSED).keys() == set(REFUSED)


def test_wrong_numbers_are_seen(bench, monkeypatch):
    """Against the numbers of another model."""
    other = bench._baseline(Combination())
    monkeypatch.setattr(bench, "_baseline", lambda baseline: other)
    outcome = bench.outcome(Combination(hybrid=True, pipeline=1))
    assert outcome.kind == "FAILED" and outcome.loss > 1e-3 and outcome.norm > 1e-3
