"""Settings from the command line, and sweeps that fill a file of results."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from experiment import Experiment, read_runs, sweep
from training import Run

from megatron_patch.commands.command_line import CommandError

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "reproduce"


def square(case: dict, run: Run, offset: int = 0) -> dict:
    """A run for the tests below."""
    if case.get("slow") and run.until < math.inf:
        run.kept.save(0, {})
        return {"accuracy": None, "partial": True}
    return {"accuracy": case["x"] ** 2 + offset, "parameters": 1}


def test_a_sweep_runs_what_is_missing(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    cases = [{"x": x} for x in range(3)]
    sweep(path, cases[:2], square, CPU)
    runs = sweep(path, cases, functools.partial(square, offset=100), CPU)
    assert [run["accuracy"] for run in runs] == [0, 1, 104]
    assert len(read_runs(path)) == 3
    assert {"settings", "accuracy", "command", "card", "date", "commit", "torch"} <= set(runs[0])
    assert runs[0]["card"].startswith("CPU")
    # A run that time cut off is told as such, is no result, goes on, and then keeps nothing.
    slow = [{"x": 5, "slow": True}]
    assert sweep(path, slow, square, CPU, minutes=1) == []
    assert read_runs(path)[-1]["partial"] and list(path.parent.glob("runs-*.pt"))
    assert [run["accuracy"] for run in sweep(path, slow, square, CPU)] == [25]
    assert not list(path.parent.glob("*.pt"))
    assert sweep(path, [{"x": 9}], square, CPU, minutes=-1) == []  # no time to begin
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(CommandError, match=r"runs\.jsonl:6: wanted a run"):
        sweep(path, cases, square, CPU)


def test_runs_go_side_by_side(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = sweep(path, [{"x": x} for x in range(4)], square, CPU, jobs=2)
    assert [run["accuracy"] for run in runs] == [0, 1, 4, 9]
    assert sorted(json.loads(line)["accuracy"] for line in path.open()) == [0, 1, 4, 9]


def test_each_setting_is_an_option(tmp_path, monkeypatch, capsys):
    made: list[dict] = []

    def run(case: dict, run: Run) -> dict:
        made.append(case)
        return {"accuracy": 1.0, "parameters": 1}

    def refuse(settings: dict) -> None:
        if settings["steps"] > 90:
            raise CommandError("too many")

    experiment = Experiment(
        "toy", dict(lr=[0.1, 0.2], seed=[0], steps=50, sizes=[3, 4], fast=False),
        dict(steps=5, seed=[0, 1], lr=[0.5]), ("seed", "lr"), run, check=refuse,
        effect=(lambda found: set(found) == {0, 1}, "both seeds"),
    )  # fmt: skip

    def command(*arguments: str) -> list[dict]:
        made.clear()
        arguments = ["toy.py", "--output", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr("sys.argv", arguments)
        experiment.main()
        return list(made)

    usual = dict(steps=50, sizes=[3, 4], fast=False)
    assert command() == [dict(usual, seed=0, lr=0.1), dict(usual, seed=0, lr=0.2)]
    assert command() == []  # they are there
    found = command("--seed", "0", "1", "--lr", "0.3", "--sizes", "7", "--fast", "--steps", "6")
    assert found == [dict(steps=6, sizes=[7], fast=True, seed=seed, lr=0.3) for seed in (0, 1)]
    assert "The effect" not in capsys.readouterr().out
    assert [case["steps"] for case in command("--tiny")] == [5, 5]
    assert "The effect is seen (both seeds): seed 0: 1.0, 1: 1.0." in capsys.readouterr().out
    with pytest.raises(CommandError, match="too many"):
        command("--steps", "91")
    for arguments in (["--lr", "0"], ["--steps", "0"], ["--seed", "-1"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            command(*arguments)
        assert f"{arguments[0]}: found {arguments[1]}" in capsys.readouterr().err


def test_run_sh_knows_the_experiments():
    told = subprocess.run([SCRIPTS / "run.sh", "nothing"], capture_output=True, text=True)
    assert told.returncode == 2
    wanted = "wanted one of ablations images lra mad mqar needle"
    assert told.stderr.strip() == f"run.sh: found nothing, {wanted}"
