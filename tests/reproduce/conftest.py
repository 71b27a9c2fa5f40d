"""Lets tests import the files of scripts/reproduce, and run their commands in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "reproduce"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture
def command(monkeypatch, tmp_path) -> Callable[..., list[dict[str, Any]]]:
    """Function: runs an experiment's command with arguments, and returns its runs."""

    def run(experiment: ModuleType, *arguments: str) -> list[dict[str, Any]]:
        from experiment import read_runs

        name = experiment.__name__
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(tmp_path), *arguments])
        experiment.EXPERIMENT.main()
        return read_runs(tmp_path / f"{name}.jsonl")

    return run
