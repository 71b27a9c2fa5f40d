#!/usr/bin/env python3
"""Prints the results of lm_eval beside the numbers that the MetaLA authors publish."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_patch.commands.command_line import CommandError, Parser, existing, run_script

# "CommonSense Reasoning benchmark" in https://github.com/BICLab/MetaLA (README, commit 3353262):
# accuracy in % of the released checkpoints, trained on 300B tokens.
SIZES = ("0.38B", "1B", "3B")
PUBLISHED = {
    "boolq": (60.09, 59.05, 62.84),
    "piqa": (67.79, 69.37, 74.16),
    "hellaswag": (38.51, 46.43, 59.25),
    "winogrande": (50.99, 54.38, 58.80),
    "arc_easy": (52.19, 57.41, 64.52),
    "arc_challenge": (25.60, 26.96, 33.28),
    "openbookqa": (30.00, 33.00, 35.80),
}
PUBLISHED_AVERAGE = (46.45, 49.52, 55.52)
METRICS = ("acc", "acc_norm")
EXPLANATION = """\
acc and acc_norm: this model, by lm_eval, in %; acc_norm divides an answer's log-likelihood by its
length. MetaLA: the authors' figures for their checkpoints of these sizes. They do not say which of
the two metrics theirs are."""


def newest_results(path: Path) -> Path:
    """Returns a results file itself, or the newest one in a folder. Raises a FileNotFoundError if
    the folder has none."""
    if path.is_file():
        return path
    files = sorted(path.rglob("results*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{path}: no results of lm_eval (results*.json)")
    return files[-1]


def read_results(path: Path) -> dict[str, dict[str, float]]:
    """Returns accuracies in %, by task and metric, of the tasks that report accuracies. Raises a
    ValueError if the file is not one of lm_eval."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if not all(isinstance(values, dict) for values in results.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: no results of lm_eval") from None
    found = {}
    for task, values in results.items():
        # lm_eval's keys are "metric,filter".
        accuracies = {
            metric: 100 * values[f"{metric},none"]
            for metric in METRICS
            if isinstance(values.get(f"{metric},none"), float)
        }
        if accuracies:
            found[task] = accuracies
    return found


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns the table as text: the published tasks in the authors' order, other tasks, averages.

    The averages are over the seven published tasks, and are left out where one is missing. A task
    without acc_norm counts with acc in the average of acc_norm.
    """
    header = ["task", *METRICS, *(f"MetaLA {size}" for size in SIZES)]
    rows = []
    for task in [*PUBLISHED, *(task for task in results if task not in PUBLISHED)]:
        ours = [results.get(task, {}).get(metric) for metric in METRICS]
        rows.append([task, *ours, *PUBLISHED.get(task, [None] * len(SIZES))])
    if all(task in results for task in PUBLISHED):
        seven = [results[task] for task in PUBLISHED]
        acc = sum(values["acc"] for values in seven) / len(seven)
        acc_norm = sum(values.get("acc_norm", values["acc"]) for values in seven) / len(seven)
        rows.append(["average", acc, acc_norm, *PUBLISHED_AVERAGE])
    texts = [header]
    for row in rows:
        texts.append([row[0], *("-" if x is None else f"{x:.2f}" for x in row[1:])])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for name, *cells in texts:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "results", type=existing, help="lm_eval's results file, or a folder of them"
    )
    path = parser.parse_args().results
    path = newest_results(path)
    try:
        text = table(read_results(path))
    except ValueError as error:
        raise CommandError(error) from None
    print(f"{path}\n\n{text}\n\n{EXPLANATION}")


if __name__ == "__main__":
    run_script(main)
