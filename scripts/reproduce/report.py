#!/usr/bin/env python3
"""Writes the tables of docs/reproduction.md, and pictures, from docs/reproduction/*.jsonl.

    cat runs/reproduce/mqar.jsonl >> docs/reproduction/mqar.jsonl
    python scripts/reproduce/report.py

A row holds the runs that differ in seed and in what was searched (learning rate, weight decay)
alone. Of each seed the best run counts, as in the paper. A row says what differs from the paper's
or our usual settings. Of a run that time cut off the last line counts, where no line says that it
ended; the row then says after how many steps its number was taken. MAD's score of a task is the
mean over all settings of the task, and has a row once they are all there. Without matplotlib there
are no pictures.
"""

from __future__ import annotations

import json
import math
import statistics
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
        note: a sentence under the title.
    """

    experiment: Experiment
    title: str
    rows: tuple[str, ...]
    paper: dict[tuple, str] = field(default_factory=dict)
    curve: str = ""
    note: str = ""

    @property
    def measure(self) -> str:
        """The key of the number that counts; accuracies are told in percent."""
        return self.experiment.measure

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.measure == "accuracy" else -1

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


# MetaLA's score of each task, and the averages over tasks, by which the paper compares models.
MAD_PAPER = dict(
    zip(mad.TASKS, ("45.55", "15.18", "99.87", "85.83", "99.73", "97.71"), strict=True)
)
MAD_AVERAGES = {"metala": "73.98", "mamba": "67.27", "gla": "63.33"}
TABLES = (
    Table(
        mqar.EXPERIMENT, "Multi-query associative recall (accuracy, %)", ("model", "width"),
        {("metala", 64): "28.5", ("metala", 128): "90.4", ("mamba", 64): "0", ("mamba", 128): "0",
         ("softmax", 64): "> 99", ("softmax", 128): "> 99"},
        "accuracy, %",
    ),
    Table(
        mad.EXPERIMENT, "MAD (accuracy, %)", ("model", "task"),
        note="A row is one setting of a task. We take the paper's numbers to be scores, which are "
             "means over all settings of a task (`--all`): "
             + ", ".join(f"{task} {score}" for task, score in MAD_PAPER.items()) + ".",
    ),
    Table(
        lra.EXPERIMENT, "Long Range Arena (accuracy, %)", ("task", "model"),
        {("listops", "metala"): "59.34", ("listops", "mamba"): "38.02"},
        "accuracy, %",
    ),
    Table(
        needle.EXPERIMENT, "A needle in a haystack (accuracy, %, by length in tokens)",
        ("model",), curve="accuracy, %",
    ),
    Table(images.EXPERIMENT, "Pictures (accuracy, %)", ("model", "data")),
    Table(
        ablations.EXPERIMENT, "Ablations (loss on held-out text)", ("variant",),
        {("full",): "42.52", ("no_augmentation",): "42.16", ("no_convolution",): "38.51",
         ("key_projection",): "40.80"},
        "validation loss (nats a token)",
        "Less loss is better. The paper's numbers are mean scores on commonsense tasks, of which "
        "more is better.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the values of `Table.rows`.
        unusual: what differs from the usual settings, and how far runs that did not end have come.
        winners: the run with the best number of each seed.
        runs: all runs of the row that ended, or where none has ended, all.
        best: the run with the best number.
    """

    name: tuple
    unusual: str
    winners: list[Result]
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
        groups.setdefault(_setting(run["settings"]), []).append(run)
    rows = []
    for group in groups.values():
        group = [run for run in group if not run.get("partial")] or group
        known = [run for run in group if run.get(table.measure) is not None]
        if not known:
            continue
        case = known[0]["settings"]
        unusual = table.unusual(case)
        if known[0].get("partial"):
            unusual.append(f"not finished: after {_progress(known)}")
        by_value = sorted(known, key=lambda run: run[table.measure] * table.sign)
        winners = {run["settings"].get("seed", 0): run for run in by_value}  # the last, the best
        name = tuple(case[name] for name in table.rows)
        rows.append(Row(name, ", ".join(unusual), list(winners.values()), group, by_value[-1]))
    return sorted(rows, key=lambda row: (tuple(map(str, row.name)), row.unusual))


def _progress(runs: list[Result]) -> str:
    """Returns how far runs of equal length, which were cut off, have come."""
    settings = runs[0]["settings"]
    unit = "epochs" if "epochs" in settings else "steps"
    done = [len(run["losses"]) if unit == "epochs" else run["steps"] for run in runs]
    told = " to ".join(f"{count:,}" for count in sorted({min(done), max(done)}))
    return f"{told} of {settings[unit]:,} {unit}"


def table_of(table: Table, rows: list[Row]) -> list[str]:
    """Returns the lines of a table, and of where its numbers come from."""
    scores = _mad_scores(rows) if table.experiment is mad.EXPERIMENT else []
    has_paper = bool(table.paper or scores)
    lengths = list(rows[0].best.get("accuracies", ()))
    head = [*table.rows, *([f"{int(length):,}" for length in lengths] or ["here"]),
            *(["paper"] if has_paper else []),
            "parameters", "best learning rate", "seeds, runs", "not as usual"]  # fmt: skip
    lines = [f"### {table.title}", "", *([table.note, ""] if table.note else []),
             "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]  # fmt: skip
    for row in rows:
        numbers = [_spread(table, [run["accuracies"].get(length, math.nan) for run in row.winners])
                   for length in lengths]  # fmt: skip
        numbers = numbers or [_spread(table, [run[table.measure] for run in row.winners])]
        cells = [*row.name, *numbers,
                 *([table.paper.get(row.name, "")] if has_paper else []),
                 f"{row.best['parameters']:,}", row.best["settings"].get("lr", ""),
                 f"{len(row.winners)}, {len(row.runs)}", row.unusual]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [*scores, ""]
    if any(len(row.winners) > 1 for row in rows):
        lines += ["Mean ± standard deviation over seeds.", ""]
    sources = {run["command"]: run for row in rows for run in row.runs}
    for command, run in sources.items():
        facts = ", ".join(run[name] for name in ("card", "date", "commit"))
        lines.append(f"- `{command}`, {facts}, PyTorch {run['torch']}")
    return [*lines, ""]


def _spread(table: Table, values: list[float]) -> str:
    """Returns the mean over seeds, and where there are several their standard deviation."""
    here = table.told(statistics.mean(values))
    return f"{here} ± {table.told(statistics.stdev(values))}" if len(values) > 1 else here


def _mad_scores(rows: list[Row]) -> list[str]:
    """Returns a row for each task of which all settings are there, and for each model of which all
    tasks are."""
    means: dict[str, dict[str, tuple[float, int]]] = {}  # by model and task
    for model, task in dict.fromkeys(row.name for row in rows):
        chosen = mad.PAPER | dict(model=[model], task=[task], all=True)
        wanted = {_setting(case) for case in mad.EXPERIMENT.cases(chosen)}
        found = {_setting(row.best["settings"]): statistics.mean(x["accuracy"] for x in row.winners)
                 for row in rows if row.name == (model, task) and not row.best.get("partial")
                 }  # fmt: skip
        if wanted <= set(found):
            mean = statistics.mean(found[setting] for setting in wanted)
            means.setdefault(model, {})[task] = mean, len(wanted)
    lines = []
    for model, tasks in means.items():
        for task, (mean, count) in tasks.items():
            paper = MAD_PAPER[task] if model == "metala" else ""
            name = f"{task}, mean of {count} settings"
            lines.append(f"| {model} | {name} | {100 * mean:.2f} | {paper} | | | | |")
        if len(tasks) == len(mad.TASKS):
            mean = 100 * statistics.mean(mean for mean, _ in tasks.values())
            paper = MAD_AVERAGES.get(model, "")
            lines.append(f"| {model} | mean of these | {mean:.2f} | {paper} | | | | |")
    return lines


def _setting(case: Settings) -> str:
    """Returns the settings but for seed and what was searched."""
    kept = {name: value for name, value in case.items() if name not in (*SEARCHED, "seed")}
    return json.dumps(kept, sort_keys=True)


def draw(path: Path, table: Table, rows: list[Row]) -> None:
    """Draws the curve of each row's best run: over the steps, or over the length of the test."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    over = "steps"
    for row in rows:
        by_length = row.best.get("accuracies")
        if by_length:
            at, curve, over = list(map(int, by_length)), list(by_length.values()), "tokens"
        else:
            curve = row.best["curve"]
            at = row.best["at"][: len(curve)]
        if table.measure == "accuracy":
            curve = [100 * value for value in curve]
        name = f"{', '.join(map(str, row.name))}: {table.told(row.best[table.measure])}"
        label = f"{name} ({row.unusual})" if row.unusual else name
        axes.plot(at, curve, label=label, marker="o" if over == "tokens" else None)
    if over == "tokens":
        axes.set_xscale("log", base=2)
    elif table.measure != "accuracy":  # the ends of loss curves lie close together
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:g}")
    numbers = {name: told for name, told in table.paper.items() if told.replace(".", "").isdigit()}
    for name in {row.name for row in rows} & set(numbers) if table.measure == "accuracy" else ():
        axes.axhline(float(numbers[name]), color="grey", linestyle=":")
        told = f"paper, {', '.join(map(str, name))}"
        axes.annotate(told, (at[0], float(numbers[name])), color="grey", va="bottom")
    axes.set(xlabel=over, ylabel=table.curve, title=table.title)
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
