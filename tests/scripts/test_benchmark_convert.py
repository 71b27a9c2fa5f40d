"""The conversion benchmark runs on a small model, and never holds the whole model in memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def test_the_model_is_streamed(run_script, tmp_path):
    settings = yaml.safe_load((CONFIGS / "metala_tiny.yml").read_text())
    settings |= {"num_layers": 16, "attention_config": [[["metala"], 16]], "hidden_size": 512}
    (tmp_path / "model.yml").write_text(yaml.safe_dump(settings))
    flags = ["--folder", tmp_path, "--config", tmp_path / "model.yml", "--repeats", 1]
    flags += ["--form", "whole", "--max-shard-size", "50MB"]
    process = run_script("benchmarks/benchmark_convert.py", *flags)
    assert process.returncode == 0, process.stderr
    found = re.search(r"model.yml: ([\d,]+) parameters .* largest tensor (\d+) MB", process.stdout)
    model, largest = int(found[1].replace(",", "")) * 2 / 1e6, int(found[2])
    peak = int(re.search(r"whole form.*peak anonymous +(\d+) MB", process.stdout, re.S)[1])
    assert peak < 1.3 * largest + 16 < model / 2, process.stdout
    assert re.search(r"speed, of the copy's +\d+%", process.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["model.yml"]


def test_a_conversion_that_fails_ends_it(tmp_path):
    """The thread that measures memory must not keep the process alive."""
    command = [
        sys.executable,
        ROOT / "scripts/benchmarks/benchmark_convert.py",
        "--child",
        tmp_path / "none",
    ]
    process = subprocess.run(
        [*map(str, command), str(tmp_path / "hf"), "5000000000"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    assert process.stderr.endswith(f"{tmp_path / 'none'} is no checkpoint: no such folder\n")
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", 0], "--repeats: found 0, wanted a whole number from 1"),
        (["--max-shard-size", "big"], "--max-shard-size: found big, wanted a size such as 5GB"),
        (["--folder", "nowhere"], "--folder: found nowhere, wanted"),
        (["--tensor-parallel", 3], "tensor parallel 3 does not divide num_attention_heads"),
        (["--tensor-parallel", 0], "--tensor-parallel: found 0, wanted a whole number from 1"),
        (["--config", "nowhere.yml"], "--config: found nowhere.yml, wanted"),
    ],
)
def test_wrong_arguments_are_named(run_command, flags, message, tmp_path):
    config = ["--folder", tmp_path, "--config", CONFIGS / "metala_tiny.yml"]
    process = run_command("benchmarks/benchmark_convert.py", *config, *flags)
    assert process.returncode and message in process.stderr
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())
