"""The training benchmark runs a small model on the CPU and reports what GPT-NeoX measured."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.neox.fork_server import fork_server

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROW = r"{} +([\d.]+) ms +([\d.]+) to ([\d.]+) +([\d,]+) +0.0 GB +([\d,]+)"


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_all_models_are_trained_and_compared(neox_checkout, run_command, monkeypatch, tmp_path):
    monkeypatch.setenv("GPT_NEOX_PATH", str(neox_checkout))
    monkeypatch.setattr(sys, "executable", str(fork_server(neox_checkout).python))
    settings = yaml.safe_load((CONFIGS / "metala_tiny.yml").read_text())
    settings |= {"num_layers": 2, "attention_config": [[["metala"], 2]], "hidden_size": 64}
    settings |= {"intermediate_size": 96, "seq_length": 64, "max_position_embeddings": 64}
    (tmp_path / "small.yml").write_text(yaml.safe_dump(settings))
    flags = ["--config", tmp_path / "small.yml", "--micro-batch", 2, "--steps", 20]
    flags += ["--models", "metala", "attention", "llama", "--recompute", "nothing", "most"]
    process = run_command("benchmarks/benchmark_training.py", *flags)
    assert process.returncode == 0, process.stderr
    names = ("metala, nothing", "metala, most", "attention, global")
    rows = [re.search(ROW.format(name), process.stdout) for name in names]
    assert all(rows), process.stdout
    speeds = []
    for step, fastest, slowest, tokens, _ in (map(number, row.groups()) for row in rows):
        assert fastest <= step <= slowest
        assert tokens == pytest.approx(2 * 64 / (step / 1e3), rel=0.05 / step + 1 / tokens)
        speeds.append(tokens)
    for name, speed in zip(names, speeds[:-1], strict=False):
        ratio = float(re.search(rf"{name} / attention, global +([\d.]+)", process.stdout)[1])
        assert ratio == pytest.approx(speed / speeds[-1], abs=0.01)
    # Another MLP width would change the number by three times the tolerance.
    parameters = [number(row[5]) for row in rows]
    assert parameters[0] == parameters[1] == pytest.approx(parameters[2], rel=1e-3)


def test_a_checkout_that_is_not_linked_is_refused(run_command, tmp_path, monkeypatch):
    for name in ("deepy.py", "train.py", "megatron/__init__.py", "megatron/model/gpt2_model.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("GPT_NEOX_PATH", str(tmp_path))
    process = run_command("benchmarks/benchmark_training.py")
    assert process.returncode == 1
    wanted = f"benchmark_training.py: link it first: scripts/link_neox.py {tmp_path}\n"
    assert process.stderr == wanted
