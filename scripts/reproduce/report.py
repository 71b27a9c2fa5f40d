#!/usr/bin/env python3
"""Writes the tables of docs/reproduction.md, and a picture, from docs/reproduction/*.jsonl.

    cat runs/reproduce/mqar.jsonl >> docs/reproduction/mqar.jsonl
    python scripts/reproduce/report.py

A row holds the runs that differ in seed and in what was searched (learning rate, weight decay)
alone. Of each seed the best run counts, as in the paper. A row says what differs from the paper's
or our usual settings, and where a run had no time to end, after how many epochs its number was
taken. Without matplotlib there is no picture.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ablations
import images
import listops
import mad
import mqar
import needle
from training import Result, Settings, read_runs

from megatron_patch.commands.command_line import CommandError, Parser, picture, run_script

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- written by report.py -->\n", "<!-- end of what report.py wrote -->\n"
SEARCHED = ("lr", "decay")


@dataclass(frozen=True)
class Experiment:
    """How the runs of an experiment become rows of a table.

    Attributes:
        name: of its file of results.
        title: of its table.
        rows: settings that name a row.
        usual: maps a run's settings to the usual ones; lists there are not compared.
        paper: the paper's numbers, by the values of `rows`.
        measure: the key of the number that counts; accuracies are told in percent.
        best: picks a seed's best number.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    usual: Callable[[Settings], Settings]
    paper: dict[tuple, str] = field(default_factory=dict)
    measure: str = "accuracy"
    best: Callable[[Iterable[float]], float] = max

    def told(self, value: float) -> str:
        """Returns a number as the table shows it."""
        return f"{100 * value:.1f}" if self.measure == "accuracy" else f"{value:.4f}"


MAD_PAPER = dict(
    zip(mad.TASKS, ("45.55", "15.18", "99.87", "85.83", "99.73", "97.71"), strict=True)
)
EXPERIMENTS = (
    Experiment(
        "mqar", "Multi-query associative recall (accuracy, %)", ("model", "width"),
        lambda case: mqar.PAPER,
        {("metala", 64): "28.5", ("metala", 128): "90.4", ("mamba", 64): "0", ("mamba", 128): "0",
         ("softmax", 64): "> 99", ("softmax", 128): "> 99"},
    ),
    Experiment(
        "mad", "MAD (accuracy, %)", ("model", "task"),
        lambda case: mad.TRAINING | mad.TASKS[case["task"]][1],
        {("metala", task): number for task, number in MAD_PAPER.items()},
    ),
    Experiment(
        "listops", "Long Range Arena: ListOps (accuracy, %)", ("model",),
        lambda case: listops.PAPER, {("metala",): "59.34", ("mamba",): "38.02"},
    ),
    Experiment(
        "needle", "A needle in a haystack, at the longest length (accuracy, %)", ("model",),
        lambda case: needle.DEFAULT,
    ),
    Experiment(
        "images", "Pictures (accuracy, %)", ("model", "data"), lambda case: images.DEFAULT,
    ),
    Experiment(
        "ablations", "Ablations (loss on held-out text)", ("variant",),
        lambda case: ablations.DEFAULT, measure="loss", best=min,
    ),
)  # fmt: skip
# The paper's averages over tasks, which is what it compares models by.
MAD_AVERAGES = {"metala": "73.98", "mamba": "67.27", "gla": "63.33"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the values of `Experiment.rows`.
        unusual: what differs from the usual settings.
        values: the best number of each seed, by seed.
        runs: all runs of the row that ended.
        best: the run with the best number.
    """

    name: tuple
    unusual: str
    values: dict[int, float]
    runs: list[Result]
    best: Result


def rows_of(experiment: Experiment, runs: list[Result]) -> list[Row]:
    """Returns the rows of an experiment. Runs without a number, such as diverged ones, count as
    runs and give no value; partial runs count only in a row that has no others."""
    groups: dict[str, list[Result]] = {}
    for run in runs:
        same = {k: v for k, v in run["settings"].items() if k not in (*SEARCHED, "seed")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    rows = []
    for group in groups.values():
        group = [run for run in group if not run.get("partial")] or group
        known = [run for run in group if run.get(experiment.measure) is not None]
        if not known:
            continue
        case = known[0]["settings"]
        usual = experiment.usual(case)
        unusual = [f"{name} {value}" for name, value in case.items()
                   if name in usual and name not in (*experiment.rows, *SEARCHED, "seed")
                   and not isinstance(usual[name], list) and usual[name] != value]  # fmt: skip
        if known[0].get("partial"):
            epochs = ", ".join(str(len(run.get("losses", ()))) for run in known)
            unusual.append(f"not finished: after {epochs} of {case.get('epochs', '?')} epochs")
        values: dict[int, float] = {}
        for run in known:
            seed, value = run["settings"].get("seed", 0), run[experiment.measure]
            values[seed] = experiment.best((value, values.get(seed, value)))
        best = experiment.best(values.values())
        winner = next(run for run in known if run[experiment.measure] == best)
        name = tuple(case[name] for name in experiment.rows)
        rows.append(Row(name, ", ".join(unusual), values, group, winner))
    return sorted(rows, key=lambda row: (tuple(map(str, row.name)), row.unusual))


def table_of(experiment: Experiment, rows: list[Row]) -> list[str]:
    """Returns the lines of an experiment's table, and of where its numbers come from."""
    head = [*experiment.rows, "here", "paper", "best learning rate", "seeds, runs", "not as usual"]
    lines = [f"### {experiment.title}", "", "| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * len(head))
    for row in rows:
        values = list(row.values.values())
        here = experiment.told(statistics.mean(values))
        if len(values) > 1:
            here += f" ± {experiment.told(statistics.stdev(values))}"
        cells = [*row.name, here, experiment.paper.get(row.name, ""),
                 row.best["settings"].get("lr", ""), f"{len(values)}, {len(row.runs)}",
                 row.unusual]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if experiment.name == "mad":
        lines += _mad_averages(rows)
    lines += ["", "Mean ± standard deviation over seeds.", ""]
    sources = {run["command"]: run for row in rows for run in row.runs}
    for command, run in sources.items():
        facts = ", ".join(run[name] for name in ("card", "date", "commit"))
        lines.append(f"- `{command}`, {facts}, PyTorch {run['torch']}")
    return [*lines, ""]


def _mad_averages(rows: list[Row]) -> list[str]:
    """Returns a row for each model that has all six tasks in the usual settings."""
    lines = []
    for model in dict.fromkeys(row.name[0] for row in rows):
        values = {row.name[1]: statistics.mean(row.values.values())
                  for row in rows if row.name[0] == model and not row.unusual}  # fmt: skip
        if len(values) == len(mad.TASKS):
            mean = 100 * statistics.mean(values.values())
            lines.append(
                f"| {model} | average | {mean:.2f} | {MAD_AVERAGES.get(model, '')} | | | |"
            )
    return lines


def draw(path: Path, rows: list[Row]) -> None:
    """Draws the accuracy of each row's best run of MQAR over its epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        curve = [100 * value for value in row.best["accuracies"]]
        name = f"{row.name[0]}, width {row.name[1]}" + (f" ({row.unusual})" if row.unusual else "")
        axes.plot(range(1, len(curve) + 1), curve, label=name)
    for width, number in ((64, 28.5), (128, 90.4)):
        axes.axhline(number, color="grey", linestyle=":")
        axes.annotate(f"paper, width {width}", (1, number), color="grey", va="bottom")
    axes.set(
        xlabel="epoch", ylabel="accuracy, %", ylim=(0, 101), title="MQAR: 80 pairs, 512 tokens"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def replaced(text: str, lines: list[str]) -> str:
    """Returns a document with the lines between its two marks. Raises a CommandError without."""
    before, found, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise CommandError(f"the document: found no lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n".join(["", *lines, ""]) + END + after


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=DOCS / "reproduction", metavar="FOLDER")
    parser.add_argument("--document", type=Path, default=DOCS / "reproduction.md", metavar="FILE")
    args = parser.parse_args()
    lines: list[str] = []
    for experiment in EXPERIMENTS:
        rows = rows_of(experiment, read_runs(args.results / f"{experiment.name}.jsonl"))
        if not rows:
            continue
        lines += table_of(experiment, rows)
        path = args.results / f"{experiment.name}.png"
        if experiment.name == "mqar" and _can_draw(path):
            draw(path, rows)
            lines += [f"![Accuracy by epoch]({args.results.name}/{path.name})", ""]
    lines = lines or ["No results yet."]
    text = args.document.read_text(encoding="utf-8")
    args.document.write_text(replaced(text, lines), encoding="utf-8")
    print(args.document)


def _can_draw(path: Path) -> bool:
    try:
        picture(str(path))
    except Exception as error:  # argparse's, which says that matplotlib is missing
        print(f"no picture: {error}")
        return False
    return True


if __name__ == "__main__":
    run_script(main)
