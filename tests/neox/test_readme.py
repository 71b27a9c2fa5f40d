"""Runs the documents' commands, from data to a published model and on from there, as they are
written: only paths are changed, and a last YAML file makes the model small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.neox.fork_server import fork_server
from tests.neox.training import LOSS, free_port

ROOT = Path(__file__).resolve().parents[2]
README, TRAINING, PUBLISHING = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/training.md", "docs/publishing.md")
)
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "attention_config": [[["metala"], 2]],
    "seq_length": 32,
    "train_micro_batch_size_per_gpu": 4,
    "eval_iters": 1,
    "log_interval": 1,
    "num_workers": 0,
    "use_wandb": False,
}


def commands(page: str, heading: str) -> list[str]:
    """Returns the lines of the shell blocks of a chapter, without those of its sub-chapters."""
    chapter = re.search(rf"\n##+ {heading}\n(.*?)\n##", page, re.DOTALL)[1]
    blocks = re.findall(r"```bash\n(.*?)```", chapter, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


class Shell:
    """Runs the documents' commands one after another, from the repository's folder on."""

    def __init__(self, places: dict[str, str], environment: dict[str, str]):
        self.places = places
        self.environment = environment
        self.folder = ROOT

    def __call__(self, command: str) -> str:
        for written, place in self.places.items():
            command = command.replace(written, place)
        if command.startswith("cd "):
            self.folder = Path(command.removeprefix("cd "))
            return ""
        run = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-4000:]}"
        return run.stdout


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in LOSS.findall(output)}


def test_from_data_to_a_published_model_and_on(neox_checkout, tokenizer_file, tmp_path):
    data, configs = tmp_path / "data", tmp_path / "configs"
    corpus = tmp_path / "corpus"
    for folder in (data, configs, corpus):
        folder.mkdir()
    (corpus / "licence.txt").write_text((ROOT / "LICENSE").read_text())
    (data / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    save = {"save": str(tmp_path / "checkpoints"), "load": str(tmp_path / "checkpoints")}
    on_cpu = re.search(r"### On a CPU\n.*?```yaml\n(.*?)```", TRAINING, re.DOTALL)[1]
    on_cpu = yaml.safe_load(on_cpu)
    local = (ROOT / "configs/local_setup.yml").read_text().replace("/data/", f"{data}/")
    (configs / "metala.yml").symlink_to(ROOT / "configs/metala.yml")
    (configs / "local_setup.yml").write_text(local)
    last = {**on_cpu, **SMALL, **save, "train_iters": 4, "checkpoint_factor": 2}
    (configs / "last.yml").write_text(yaml.safe_dump({**last, "master_port": free_port()}))
    shell = Shell(
        {
            "python ./deepy.py": f"{fork_server(neox_checkout).python} ./deepy.py",
            "python ": f"{sys.executable} ",
            "metala-convert": f"{sys.executable} convert/neox_to_hf.py",
            "corpus/": f"{corpus}/",
            "/data/": f"{data}/",
            "/path/to/gpt-neox": str(neox_checkout),
            "-d configs metala.yml local_setup.yml": f"-d {configs} metala.yml local_setup.yml "
            "last.yml",
            "--checkpoint checkpoints": f"--checkpoint {save['save']}",
            "metala-hf": str(tmp_path / "metala-hf"),
            "--output imported": f"--output {tmp_path / 'imported'}",
            "/path/to/imported": str(tmp_path / "imported"),
        },
        {
            **os.environ,
            "GPT_NEOX_PATH": str(neox_checkout),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
    )

    cluster = commands(TRAINING, "Train on a cluster")
    outputs = [shell(line) for line in cluster if "pip install" not in line]
    assert sorted(losses(outputs[-1])) == [1, 2, 3, 4]

    shell.folder = ROOT
    (export,) = commands(PUBLISHING, "Publish a checkpoint")
    assert "verified largest logit difference" in shell(export)

    convert, into, train = commands(PUBLISHING, "Go on training a published model")
    shell(convert.replace("--tensor-parallel 2", "--tensor-parallel 1"))
    yours = {"data_path": str(data / "text_document"), "save": str(tmp_path / "tuned"), **on_cpu}
    yours |= {"checkpoint_factor": 2, "train_iters": 4, "lr_decay_iters": 8, "eval_iters": 1}
    small = {key: SMALL[key] for key in ("seq_length", "train_micro_batch_size_per_gpu")}
    yours |= {
        **small,
        "gradient_accumulation_steps": None,
        "log_interval": 1,
        "num_workers": 0,
        "master_port": free_port(),
    }
    for steps in (2, 4):  # stopped after two steps, and started again
        file = tmp_path / "imported/configs/yours.yml"
        file.write_text(yaml.safe_dump({**yours, "exit_interval": steps}))
        shell(into)
        output = shell(train)
        assert sorted(losses(output)) == [steps - 1, steps]


@pytest.mark.parametrize(
    ("page", "heading"),
    [(TRAINING, "Train on a cluster"), (PUBLISHING, "Publish a checkpoint")],
    ids=["training", "publishing"],
)
def test_the_chapters_have_commands(page, heading):
    assert commands(page, heading)


def test_readme_has_the_same_commands():
    recipe = commands(TRAINING, "Train on a cluster") + commands(PUBLISHING, "Publish a checkpoint")
    assert commands(README, "Train on a cluster") == recipe
