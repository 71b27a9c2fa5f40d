"""What tests of several folders share: a GPT-NeoX checkout, data and a tokenizer to train on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 512


def find_neox() -> Path | None:
    """The checkout that `GPT_NEOX_PATH` names, or the one that set-up cloned."""
    path = Path(os.environ.get("GPT_NEOX_PATH") or ROOT / "third_party" / "gpt-neox")
    return path if (path / "megatron" / "__init__.py").is_file() else None


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Function: a folder of this name that `fill` has written, once for all workers of
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
    """A linked copy of the GPT-NeoX checkout with its helper compiled, which each training would
    do that finds none; the tests that need one are skipped where none is."""
    source = find_neox()
    if source is None:
        pytest.skip("no GPT-NeoX checkout")

    def copy(folder: Path) -> None:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git"))
        subprocess.run([sys.executable, ROOT / "scripts/link_neox.py", folder], check=True)
        subprocess.run(["make", "-C", folder / "megatron/data"], check=True)

    return make_once("gpt-neox", copy)


@pytest.fixture(scope="session")
def two_gpus() -> None:
    """Skips a test where there are fewer."""
    if (found := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs, found {found}")


def pytest_collection_modifyitems(items):
    for item in items:
        if "neox_checkout" in item.fixturenames:
            item.add_marker("trains_in_neox")
        if "two_gpus" in item.fixturenames:
            item.add_marker("needs_two_gpus")


def pytest_terminal_summary(terminalreporter):
    """From the reports, since the tests may have run in other processes (pytest-xdist); those of
    files that could not be collected have no keywords."""

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
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
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
