"""The benchmark of the conversion, on a small model: it runs, and no whole model is in memory."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_model_is_streamed(run_script, tmp_path):
    settings = yaml.safe_load((CONFIGS / "metala_tiny.yml").read_text())
    settings |= {"num_layers": 16, "attention_config": [[["metala"], 16]], "hidden_size": 512}
    (tmp_path / "model.yml").write_text(yaml.safe_dump(settings))
    flags = ["--folder", tmp_path, "--config", tmp_path / "model.yml", "--repeats", 1]
    flags += ["--form", "whole", "--max-shard-size", "50MB"]
    process = run_script("benchmark_convert.py", *flags)
    assert process.returncode == 0, process.stderr
    found = re.search(r"model.yml: ([\d,]+) parameters .* largest tensor (\d+) MB", process.stdout)
    model, largest = int(found[1].replace(",", "")) * 2 / 1e6, int(found[2])
    peak = int(re.search(r"whole form.*peak anonymous +(\d+) MB", process.stdout, re.S)[1])
    assert peak < 1.3 * largest + 16 < model / 2, process.stdout
    assert re.search(r"speed, of the copy's +\d+%", process.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["model.yml"]
