"""Fixtures for tests of several folders: a GPT-NeoX checkout, data and a tokenizer, a small run,
and functions that run commands."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_patch.commands.command_line import run_script as run_in_terminal

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
# The scripts that only start a module of megatron_patch/commands.
PACKAGED = ("link_neox.py", "prepare_data.py", "train_hf.py")
VOCABULARY = 512

# A model of two layers and 16 iterations, which take seconds on one core.
SMALL_RUN = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "seq_length": 32,
    "attention_config": [[["metala"], 2]],
    "norm": "simplermsnorm",
    "rms_norm_epsilon": 1.0e-6,
    "activation": "swiglu",
    "pos_emb": "none",
    "no_weight_tying": True,
    "tokenizer_type": "HFTokenizer",
    "train_micro_batch_size_per_gpu": 4,
    "train_iters": 16,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-2, "betas": [0.9, 0.95]}},
    "lr_decay_style": "cosine",
    "min_lr": 1.0e-3,
    "warmup": 0.1,
    "split": "80,20,0",
    "checkpoint_factor": 8,
    "eval_interval": 8,
    "eval_iters": 2,
    "log_interval": 1,
    "distributed_backend": "gloo",
}


def find_neox() -> Path | None:
    """Returns the checkout in `GPT_NEOX_PATH`, or the one that setup.sh cloned, or `None`."""
    path = Path(os.environ.get("GPT_NEOX_PATH") or ROOT / "third_party" / "gpt-neox")
    return path if (path / "megatron" / "__init__.py").is_file() else None


def small_config(**changes):
    """Returns a `MetaLAConfig` of 2 layers, width 32 and 2 heads, with changes."""
    from megatron_patch.hf import MetaLAConfig

    sizes = dict(decoder_embed_dim=32, decoder_layers=2, decoder_attention_heads=2, glu_dim=40)
    return MetaLAConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Function: returns a folder of this name that `fill` writes once for all workers of
    pytest-xdist."""
    from filelock import FileLock  # which a machine that runs tests/gpu alone may lack

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = root / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                try:
                    fill(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder

    return make


@pytest.fixture(scope="session")
def neox_checkout(make_once) -> Path:
    """A linked copy of the GPT-NeoX checkout with its helper compiled, so that no training compiles
    it again. Tests that need it are skipped without a checkout."""
    if find_neox() is None:
        pytest.skip("no GPT-NeoX checkout")

    return make_once("gpt-neox", link_copy)


def link_copy(folder: Path) -> Path:
    """Copies the checkout to `folder`, links it and compiles its helper; returns the folder."""
    shutil.copytree(find_neox(), folder, ignore=shutil.ignore_patterns(".git"))
    subprocess.run([sys.executable, SCRIPTS / "link_neox.py", folder], check=True)
    subprocess.run(["make", "-C", folder / "megatron/data"], check=True)
    return folder


@pytest.fixture(scope="session")
def two_gpus() -> None:
    """Skips a test on a machine with fewer than two GPUs."""
    if (found := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs, found {found}")


def pytest_collection_modifyitems(items):
    for item in items:
        if "neox_checkout" in item.fixturenames:
            item.add_marker("trains_in_neox")
        if "two_gpus" in item.fixturenames:
            item.add_marker("needs_two_gpus")


def pytest_terminal_summary(terminalreporter):
    """Prints whether the GPT-NeoX and GPU tests ran. It counts reports, because pytest-xdist runs
    tests in other processes; reports of files that could not be collected have no keywords."""

    def outcomes(marker: str) -> str:
        counts = {
            outcome: sum(marker in getattr(report, "keywords", ()) for report in reports)
            for outcome in ("passed", "failed", "error", "skipped")
            if (reports := terminalreporter.getreports(outcome))
        }
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)

    def tell(tests: str, marker: str, source: str, lack: str) -> None:
        if not (told := outcomes(marker)):
            state = "not asked for"
        elif source:
            state = f"RAN with {source} ({told})"
        else:
            state = f"SKIPPED: {lack} ({told})"
        terminalreporter.write_line(f"{tests}: {state}")

    terminalreporter.section("GPT-NeoX, GPUs")
    checkout, gpus = find_neox(), torch.cuda.device_count()
    tell(
        "Tests that train in GPT-NeoX",
        "trains_in_neox",
        f"real GPT-NeoX from {checkout}" if checkout else "",
        "no checkout, set GPT_NEOX_PATH or run scripts/setup.sh",
    )
    tell("Tests on a GPU", "gpu", f"{gpus} GPUs" if gpus else "", "found no CUDA device")
    tell(
        "Tests on two GPUs",
        "needs_two_gpus",
        f"{gpus} GPUs" if gpus > 1 else "",
        f"found {gpus}",
    )


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer.json with exactly VOCABULARY tokens."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def train_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "LICENSE"), shutil.__file__], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def token_data(tmp_path_factory) -> Path:
    """Prefix of a GPT-NeoX .bin/.idx pair: 64 documents of learnable tokens (a noisy cycle)."""
    from megatron_patch.indexed_dataset import IndexedDatasetWriter

    rng = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    with IndexedDatasetWriter(prefix, vocab_size=VOCABULARY) as writer:
        for _ in range(64):
            steps = rng.choice([1, 2], p=[0.9, 0.1], size=600)
            writer.add_document((rng.integers(VOCABULARY) + np.cumsum(steps)) % VOCABULARY)
    return prefix


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory) -> Path:
    """Prefix of a .bin/.idx pair: documents of 1 to 59 tokens of a cycle and <|endoftext|>, 0."""
    from megatron_patch.indexed_dataset import IndexedDatasetWriter

    rng = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("documents") / "tokens"
    with IndexedDatasetWriter(prefix, vocab_size=VOCABULARY) as writer:
        for length in rng.integers(1, 60, size=400):
            cycle = (rng.integers(VOCABULARY) + np.arange(length)) % (VOCABULARY - 1) + 1
            writer.add_document(np.append(cycle, 0))
    return prefix


@pytest.fixture
def run_script():
    """Function: runs scripts/NAME with arguments as a process; returns it finished, with its output
    as text."""

    def run(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, SCRIPTS / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        )

    return run


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Function: as `run_script`, but in this process, which has already imported PyTorch and
    transformers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        argv = [*map(str, arguments)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *argv])
        capsys.readouterr()
        code, message = 0, ""
        try:
            if name in PACKAGED:
                module = import_module(f"megatron_patch.commands.{Path(name).stem}")
                run_in_terminal(lambda: module.main(argv))
            else:
                runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as end:
            is_text = isinstance(end.code, str)  # Python prints it and exits with 1
            code, message = (1, f"{end.code}\n") if is_text else (end.code or 0, "")
        written = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, written.out, written.err + message)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_run(tmp_path, tokenizer_file, token_data):
    """Function: writes SMALL_RUN with changes (`None` removes a key) as a YAML file; returns it."""

    def write(name: str = "run", **changes: object) -> Path:
        folder = tmp_path / name
        settings = {
            **SMALL_RUN,
            "vocab_file": str(tokenizer_file),
            "data_path": str(token_data),
            "save": str(folder),
            "load": str(folder),
            **changes,
        }
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return path

    return write
