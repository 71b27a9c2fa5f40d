"""The report of the experiments' results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mad
import mqar
import needle
import pytest
import report

from megatron_patch.commands.command_line import CommandError

FACTS = dict(command="python mqar.py", card="a card", date="2026-11-29", commit="abc", torch="2.11")


def run_of(case: dict, accuracy: float | None, **others) -> dict:
    return {"settings": case, "accuracy": accuracy, "curve": [0.1], "at": [5], "losses": [1.0],
            "parameters": 1234, **FACTS, **others}  # fmt: skip


def recall(width: int, rate: float, seed: int, accuracy: float | None, **others) -> dict:
    case = {name: value for name, value in mqar.PAPER.items() if name not in ("lr", "seed")}
    epochs, kernel_size = others.pop("epochs", 64), others.pop("kernel_size", 2)
    chosen = dict(
        model="metala", width=width, lr=rate, seed=seed, epochs=epochs, kernel_size=kernel_size
    )
    return run_of(case | chosen, accuracy, **others)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Function: writes results and a document, and returns the document that the report makes."""

    def run(document: str, **results: list[dict]) -> str:
        for name, runs in results.items():
            lines = [json.dumps(run) for run in runs]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        path = tmp_path / "document.md"
        path.write_text(document)
        arguments = ["--results", str(tmp_path), "--document", str(path)]
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        report.main()
        return path.read_text()

    return run


EMPTY = f"Before\n{report.BEGIN}old\n{report.END}after\n"


def test_the_best_rate_of_each_seed_counts(write):
    runs = [
        recall(128, 1e-3, 0, 0.20), recall(128, 1e-2, 0, 0.80), recall(128, 1e-4, 0, None),
        recall(128, 1e-3, 1, 0.90), recall(128, 1e-2, 1, 0.10),
    ]  # fmt: skip
    text = write(EMPTY, mqar=runs)
    assert "| metala | 128 | 85.0 ± 7.1 | 90.4 | 1,234 | 0.001 | 2, 5 |  |" in text
    assert "- `python mqar.py`, a card, 2026-11-29, abc, PyTorch 2.11" in text
    assert text.startswith("Before\n") and text.endswith("after\n") and "old" not in text
    assert write(text, mqar=runs) == text


def test_what_is_unusual_or_unfinished_is_told(write):
    runs = [
        recall(64, 1e-3, 0, 0.30),
        recall(64, 1e-3, 0, 0.99, partial=True),  # the same run, cut off before
        recall(64, 1e-3, 0, 0.50, epochs=8),
        recall(64, 1e-3, 0, 0.05, kernel_size=1),
        recall(128, 1e-3, 0, 0.60, partial=True),
        recall(128, 1e-3, 0, 0.40, partial=True, losses=[2.0, 1.0]),  # the same run, gone on
    ]
    text = write(EMPTY, mqar=runs)
    assert "±" not in text
    assert "| metala | 64 | 30.0 | 28.5 | 1,234 | 0.001 | 1, 1 |  |" in text
    assert "| metala | 64 | 50.0 | 28.5 | 1,234 | 0.001 | 1, 1 | epochs 8 |" in text
    assert "| metala | 64 | 5.0 | 28.5 | 1,234 | 0.001 | 1, 1 | kernel_size 1 |" in text
    assert "| 40.0 | 90.4 | 1,234 | 0.001 | 1, 1 | not finished: after 2 of 64 epochs |" in text


def test_how_far_several_runs_have_come_is_told_once(write):
    rates = {1e-4: [1.0], 1e-3: [1.0, 0.5, 0.2], 1e-2: [1.0, 0.5]}
    runs = [recall(128, rate, 0, 0.1, partial=True, losses=x) for rate, x in rates.items()]
    text = write(EMPTY, mqar=runs)
    assert "| 1, 3 | not finished: after 1 to 3 of 64 epochs |" in text
    # Runs of several commands: each of them is named.
    runs[0]["command"] = "python mqar.py --lr 1e-4"
    text = write(EMPTY, mqar=runs)
    assert text.count("- `python mqar.py`") == text.count("- `python mqar.py --lr 1e-4`") == 1


def test_a_score_of_mad_is_the_mean_over_all_settings(write):
    """The setting with the number i has an accuracy of i / 100 in its best run."""
    cases = mad.EXPERIMENT.cases(mad.PAPER | dict(task=["compression"], lr=[1e-3], all=True))
    runs = [run_of(case, index * 0.005 * (1 + case["decay"] * 10), curve=[])
            for index, case in enumerate(cases)]  # fmt: skip
    wanted = sum(0.01 * index for index in range(11, 22)) / 11  # the second decay's
    text = write(EMPTY, mad=runs)
    assert f"| metala | compression, mean of 11 settings | {100 * wanted:.2f} | 45.55 |" in text
    assert "| 11.0 |  | 1,234 | 0.001 | 1, 2 |  |" in text
    unfinished = [*runs[:-1], run_of(cases[-1], 0.2, partial=True)]
    assert "mean of" not in write(EMPTY, mad=[*unfinished[:10], *unfinished[11:]])


def test_mad_has_an_average_once_all_tasks_are_there(write):
    runs = [
        run_of(case, 0.5 + index / 10)
        for index, task in enumerate(mad.TASKS)
        for case in mad.EXPERIMENT.cases(
            mad.PAPER | dict(task=[task], lr=[1e-3], decay=[0.0], all=True)
        )
    ]
    assert "mean of these" not in write(EMPTY, mad=runs[:-1])
    text = write(EMPTY, mad=runs)
    assert "| metala | mean of these | 75.00 | 73.98 |" in text
    assert "| metala | copy, mean of 13 settings | 100.00 | 97.71 |" in text


def test_needles_are_told_by_length(write):
    case = needle.EXPERIMENT.cases(needle.USUAL)[0]
    found = [{"1024": 1.0, "65536": 0.2}, {"1024": 0.9, "65536": 0.4}]
    runs = [
        run_of(case | dict(seed=seed), x["65536"], accuracies=x) for seed, x in enumerate(found)
    ]
    text = write(EMPTY, needle=runs)
    assert "| model | 1,024 | 65,536 | parameters |" in text
    assert "| metala | 95.0 ± 7.1 | 30.0 ± 14.1 | 1,234 | 0.001 | 2, 2 |  |" in text


def test_every_experiment_has_usual_settings():
    """Those of its own cases: nothing in them is unusual."""
    for table in report.TABLES:
        for case in table.experiment.cases(table.experiment.usual):
            assert table.unusual(case) == []
    case = mad.EXPERIMENT.cases(mad.PAPER | dict(heads=2, task=["copy"], model=["softmax"]))[0]
    assert report.TABLES[1].unusual(case | dict(copied=32)) == ["copied 32", "heads 2"]


def test_a_document_without_marks_is_refused(write):
    with pytest.raises(CommandError, match="found no lines"):
        write("nothing", mqar=[recall(64, 1e-3, 0, 0.3)])


def test_the_document_in_the_repository_can_be_written():
    text = (Path(report.DOCS) / "reproduction.md").read_text(encoding="utf-8")
    assert report.replaced(text, ["x"]).count(report.BEGIN) == 1
