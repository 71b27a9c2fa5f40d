"""Runs of the stock `deepy.py train.py` in a linked GPT-NeoX checkout, as a user starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

from megatron_patch.neox.upstream_fixes import rendezvous
from tests.neox.fork_server import fork_server

LOSS = re.compile(r"iteration\s+(\d+)/.*?lm_loss: (\S+) \|")
VALIDATION_LOSS = re.compile(r"validation results at (.+?) \| lm_loss value: (\S+)")
FLOPS = re.compile(
    r"elapsed time per iteration \(ms\): (\S+) \|.*?approx flops per GPU: (\S+?)([A-Z])FLOPS"
)

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "attention_config": [[["metala"], 2]],
    "metala": {"init": "authors"},
    "norm": "simplermsnorm",
    "rms_norm_epsilon": 1.0e-6,
    "activation": "swiglu",
    "pos_emb": "none",
    "no_weight_tying": True,
    "make_vocab_size_divisible_by": 128,
}
TRAINING = {
    "train_micro_batch_size_per_gpu": 4,
    "train_iters": 20,
    "optimizer": {
        "type": "cpu_torch_adam",
        "params": {"lr": 3.0e-3, "betas": [0.9, 0.95], "eps": 1.0e-8},
    },
    "min_lr": 3.0e-4,
    "lr_decay_style": "cosine",
    "lr_decay_iters": 20,
    "warmup": 0.1,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "precision": "fp32",
    "distributed_backend": "gloo",
    "split": "90,5,5",
    "eval_iters": 2,
    "log_interval": 1,
    "steps_per_print": 1000,
    "use_wandb": False,
    "num_workers": 0,
    "seed": 1234,
}


@dataclass
class Run:
    """One finished training: its exit code, what it printed, and the losses by iteration."""

    returncode: int
    output: str

    @property
    def losses(self) -> dict[int, float]:
        return {int(step): float(loss) for step, loss in LOSS.findall(self.output)}

    @property
    def validation_losses(self) -> dict[str, float]:
        return {when: float(loss) for when, loss in VALIDATION_LOSS.findall(self.output)}


def free_port() -> int:
    """A free port that no other worker of pytest-xdist chooses."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return rendezvous.free_port(rendezvous.PORTS[worker % 16 :: 16])


def settings(token_data: Path, tokenizer_file: Path, tp: int = 1, pp: int = 0, **changes) -> dict:
    """The YAML settings of a two-layer model on the test data, with `changes` applied."""
    parallel = {"model_parallel_size": tp, "pipe_parallel_size": pp}
    data = {
        "data_path": str(token_data),
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(tokenizer_file),
    }
    return {**MODEL, **TRAINING, **parallel, **data, **changes}


def start(
    checkout: Path,
    program: str,
    config: dict,
    folder: Path,
    python: str | Path = sys.executable,
    start_new_session: bool = False,
    **environment: str,
) -> subprocess.Popen:
    """Starts `deepy.py PROGRAM` on `config`, written to a YAML file in `folder`. With gloo it runs
    on the CPU, whatever the machine has."""
    if config["distributed_backend"] == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{Path(program).stem}.yml"
    file.write_text(yaml.safe_dump({"master_port": free_port(), **config}))
    return subprocess.Popen(
        [python, "./deepy.py", program, str(file)],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
    )


def neox(
    checkout: Path,
    program: str,
    config: dict,
    folder: Path,
    typed: str | None = None,
    **environment: str,
) -> Run:
    """Runs `deepy.py PROGRAM`, which reads what is `typed`, to its end, by a
    fork server."""
    on_gpus = config["distributed_backend"] != "gloo"
    environment.setdefault("python", fork_server(checkout, on_gpus).python)
    process = start(checkout, program, config, folder, **environment)
    output, _ = process.communicate(typed, timeout=600)
    return Run(process.returncode, output)


def train(checkout: Path, config: dict, folder: Path, **environment: str) -> Run:
    """A training that must succeed."""
    run = neox(checkout, "train.py", config, folder, **environment)
    assert run.returncode == 0, run.output[-6000:]
    return run


def train_once(
    make_once: Callable, name: str, checkout: Path, config: dict, **environment: str
) -> tuple[Run, Path]:
    """A training that runs once for all workers, with checkpoints from step 0 on in the folder
    `checkpoints` of the one returned. wandb writes there too."""

    def run(folder: Path) -> None:
        saved = {**config, "save": str(folder / "checkpoints"), "extra_save_iters": [0]}
        output = train(checkout, saved, folder, WANDB_DIR=str(folder), **environment).output
        (folder / "output").write_text(output)

    folder = make_once(name, run)
    return Run(0, (folder / "output").read_text()), folder


def stand_in(defaults: dict, **changes) -> SimpleNamespace:
    """Returns attributes that stand for GPT-NeoX's settings, for checks that read only a few."""
    return SimpleNamespace(**{**defaults, **changes})
