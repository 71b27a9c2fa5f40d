#!/usr/bin/env python3
"""Writes the tables of docs/reproduction.md, and pictures, from docs/reproduction/*.jsonl.

    cat runs/reproduce/mqar.jsonl >> docs/reproduction/mqar.jsonl
    python scripts/reproduce/report.py

A row holds the runs that differ in seed and in what was searched (learning rate, weight decay)
alone. Of each seed the best run counts, as in the paper. A row says what differs from the paper's
or our usual settings. Of a run that time cut off the last line counts, where no line says that it
ended; the row then says after how many steps its number was taken. Without matplotlib there are no
pictures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ablations
import images
import lra
import mad
import mqar
import needle
from experiment import Experiment, Settings, read_runs
from training import Result

from megatron_patch.commands.command_line import CommandError, Parser, picture, run_script

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- written by report.py -->\n", "<!-- end of what report.py wrote -->\n"
SEARCHED = ("lr", "decay")


@dataclass(frozen=True)
class Table:
    """How the runs of an experiment become rows of a table.

    Attributes:
        experiment: whose runs.
        title: of the table.
        rows: settings that name a row.
        paper: the paper's numbers, by the values of `rows`.
        curve: what a picture of the runs' curves shows; empty for no picture.
    """

    experiment: Experiment
    title: str
    rows: tuple[str, ...]
    paper: dict[tuple, str] = field(default_factory=dict)
    curve: str = ""

    @property
    def measure(self) -> str:
        """The key of the number that counts; accuracies are told in percent."""
        return self.experiment.measure

    @property
    def best(self) -> Callable[[Iterable[float]], float]:
        """Picks the best number."""
        return max if self.measure == "accuracy" else min

    def unusual(self, case: Settings) -> list[str]:
        """Returns the settings of a run that are not the usual ones of its model and task."""
        swept, usual = self.experiment.swept, self.experiment.usual
        wanted = next(iter(self.experiment.expand(usual | {name: case[name] for name in swept})))
        return [f"{name} {value}" for name, value in case.items()
                if name in wanted and name not in (*self.rows, *SEARCHED, "seed")
                and (value not in usual[name] if name in swept else value != wanted[name])
                ]  # fmt: skip

    def told(self, value: float) -> str:
        """Returns a number as the table shows it."""
        return f"{100 * value:.1f}" if self.measure == "accuracy" else f"{value:.4f}"


MAD_PAPER = dict(
    zip(mad.TASKS, ("45.55", "15.18", "99.87", "85.83", "99.73", "97.71"), strict=True)
)
TABLES = (
    Table(
        mqar.EXPERIMENT, "Multi-query associative recall (accuracy, %)", ("model", "width"),
        {("metala", 64): "28.5", ("metala", 128): "90.4", ("mamba", 64): "0", ("mamba", 128): "0",
         ("softmax", 64): "> 99", ("softmax", 128): "> 99"},
        "accuracy, %",
    ),
    Table(
        mad.EXPERIMENT, "MAD (accuracy, %)", ("model", "task"),
        {("metala", task): number for task, number in MAD_PAPER.items()},
    ),
    Table(
        lra.EXPERIMENT, "Long Range Arena (accuracy, %)", ("task", "model"),
        {("listops", "metala"): "59.34", ("listops", "mamba"): "38.02"},
    ),
    Table(
        needle.EXPERIMENT, "A needle in a haystack, at the longest length (accuracy, %)",
        ("model",),
    ),
    Table(images.EXPERIMENT, "Pictures (accuracy, %)", ("model", "data")),
    Table(
        ablations.EXPERIMENT, "Ablations (loss on held-out text)", ("variant",),
        curve="validation loss (nats a token)",
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


def rows_of(table: Table, runs: list[Result]) -> list[Row]:
    """Returns the rows of a table. Runs without a number, such as diverged ones, count as runs and
    give no value."""
    runs_by_case = {}  # the last one that ended, else the last one
    for run in sorted(runs, key=lambda run: not run.get("partial")):
        runs_by_case[json.dumps(run["settings"], sort_keys=True)] = run
    groups: dict[str, list[Result]] = {}
    for run in runs_by_case.values():
        same = {k: v for k, v in run["settings"].items() if k not in (*SEARCHED, "seed")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    rows = []
    for group in groups.values():
        group = [run for run in group if not run.get("partial")] or group
        known = [run for run in group if run.get(table.measure) is not None]
        if not known:
            continue
        case = known[0]["settings"]
        unusual = table.unusual(case)
        if known[0].get("partial"):
            unusual.append(f"not finished: after {', '.join(map(_progress, known))}")
        values: dict[int, float] = {}
        for run in known:
            seed, value = run["settings"].get("seed", 0), run[table.measure]
            values[seed] = table.best((value, values.get(seed, value)))
        best = table.best(values.values())
        winner = next(run for run in known if run[table.measure] == best)
        name = tuple(case[name] for name in table.rows)
        rows.append(Row(name, ", ".join(unusual), values, group, winner))
    return sorted(rows, key=lambda row: (tuple(map(str, row.name)), row.unusual))


def _progress(run: Result) -> str:
    """Returns how far a run that was cut off has come."""
    epochs = run["settings"].get("epochs")
    if epochs is not None:
        return f"{len(run['losses'])} of {epochs} epochs"
    return f"{run['steps']:,} of {run['settings'].get('steps', '?'):,} steps"


def table_of(table: Table, rows: list[Row]) -> list[str]:
    """Returns the lines of a table, and of where its numbers come from."""
    head = [*table.rows, "here", "paper", "parameters", "best learning rate", "seeds, runs",
            "not as usual"]  # fmt: skip
    lines = [f"### {table.title}", "", "| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * len(head))
    for row in rows:
        values = list(row.values.values())
        here = table.told(statistics.mean(values))
        if len(values) > 1:
            here += f" ± {table.told(statistics.stdev(values))}"
        cells = [*row.name, here, table.paper.get(row.name, ""),
                 f"{row.best['parameters']:,}", row.best["settings"].get("lr", ""),
                 f"{len(values)}, {len(row.runs)}", row.unusual]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if table.experiment is mad.EXPERIMENT:
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
                f"| {model} | average | {mean:.2f} | {MAD_AVERAGES.get(model, '')} | | | | |"
            )
    return lines


def draw(path: Path, table: Table, rows: list[Row]) -> None:
    """Draws the curve of each row's best run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    is_accuracy = table.measure == "accuracy"
    for row in rows:
        curve = [100 * value if is_accuracy else value for value in row.best["curve"]]
        name = ", ".join(map(str, row.name)) + (f" ({row.unusual})" if row.unusual else "")
        axes.plot(row.best["at"][: len(curve)], curve, label=name)
    numbers = {name: told for name, told in table.paper.items() if told.replace(".", "").isdigit()}
    for name in {row.name for row in rows} & set(numbers):
        axes.axhline(float(numbers[name]), color="grey", linestyle=":")
        told = f"paper, {', '.join(map(str, name))}"
        axes.annotate(told, (1, float(numbers[name])), color="grey", va="bottom")
    axes.set(xlabel="steps", ylabel=table.curve, title=table.title)
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
    for table in TABLES:
        name = table.experiment.name
        rows = rows_of(table, read_runs(args.results / f"{name}.jsonl"))
        if not rows:
            continue
        lines += table_of(table, rows)
        path = args.results / f"{name}.png"
        if table.curve and _can_draw(path):
            draw(path, table, rows)
            lines += [f"![{table.title}]({args.results.name}/{path.name})", ""]
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
