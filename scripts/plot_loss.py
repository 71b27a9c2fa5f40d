#!/usr/bin/env python3
"""Draws loss curves from logs: the metrics.jsonl of train_hf.py, or a file with GPT-NeoX's output.
Several files give several curves."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    existing_file,
    picture,
    run_script,
)

_NEOX_TRAIN = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*?\blm_loss: (\S+)")
_NEOX_VALID = re.compile(r"validation results at iteration (\d+) \| lm_loss value: (\S+)")


@dataclass
class Losses:
    """Losses by iteration: in training the mean since the line before, and in validation."""

    train: dict[int, float] = field(default_factory=dict)
    valid: dict[int, float] = field(default_factory=dict)


def read_losses(path: Path) -> Losses:
    """Returns the losses in a log. Where a resumed run repeated an iteration, the last one counts.
    Raises a ValueError if the log has no training losses, or a line is malformed."""
    losses = Losses()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for count, line in enumerate(lines, 1):
        try:
            _read_line(line, losses)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{count}: found no numbers, wanted a loss") from None
    if not losses.train:
        raise ValueError(f"{path}: holds no training losses")
    return Losses(dict(sorted(losses.train.items())), dict(sorted(losses.valid.items())))


def _read_line(line: str, losses: Losses) -> None:
    if line.startswith('{"iteration"'):
        row = json.loads(line)
        for key, target in (("loss", losses.train), ("eval_loss", losses.valid)):
            if key in row:
                target[int(row["iteration"])] = float(row[key])
    elif match := _NEOX_TRAIN.search(line):
        losses.train[int(match[1])] = float(match[2])
    elif match := _NEOX_VALID.search(line):
        losses.valid[int(match[1])] = float(match[2])


def plot(curves: dict[str, Losses], output: Path, title: str | None = None) -> None:
    """Writes a picture of the curves, given by label; the suffix of `output` sets its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, losses in curves.items():
        (line,) = axes.plot(list(losses.train), list(losses.train.values()), label=label)
        if losses.valid:
            axes.plot(
                list(losses.valid),
                list(losses.valid.values()),
                "o--",
                color=line.get_color(),
                label=f"{label}, validation",
            )
    axes.set(xlabel="iteration", ylabel="cross entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("logs", type=existing_file, nargs="+")
    parser.add_argument("--labels", nargs="+", help="one for each log; by default their names")
    parser.add_argument("--output", type=picture, default="loss.png")
    parser.add_argument("--title")
    args = parser.parse_args()
    labels = args.labels or [str(path) for path in args.logs]
    if len(labels) != len(args.logs):
        parser.error(f"--labels: found {len(labels)}, wanted {len(args.logs)}")
    try:
        curves = {label: read_losses(path) for label, path in zip(labels, args.logs, strict=True)}
    except ValueError as error:
        raise CommandError(error) from None
    plot(curves, args.output, args.title)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
