"""Commands called inside a process leave it as it was: environment, signals, PyTorch's switches."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from convert.hf_to_neox import hf_to_neox
from convert.neox_to_hf import neox_to_hf
from convert.reshape_neox import reshape_neox
from megatron_patch.commands import prepare_data, train_hf
from tests.convert.conftest import write_tokenizer
from tests.convert.synthetic import Model, write

OF_OTHERS = ("PYTORCH_NVML_BASED_CUDA_CHECK", "WANDB_SERVICE")  # accelerate and wandb set these


def state_of_process() -> dict[str, object]:
    """Returns what a caller would notice if a command changed it."""
    return {
        "environment": {name: x for name, x in os.environ.items() if name not in OF_OTHERS},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "folder": os.getcwd(),
        "arguments": list(sys.argv),
        "path": list(sys.path),
        "streams": (sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "TF32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "safe globals": set(torch.serialization.get_safe_globals()),
        "garbage collection": gc.isenabled(),
        "logging": transformers.logging.get_verbosity(),
        "progress bars": transformers.logging.is_progress_bar_enabled(),
    }


@contextmanager
def unchanged(*others: str) -> Iterator[None]:
    """Asserts that what it surrounds changes nothing of the process but `others`."""
    before = state_of_process()
    yield
    after = state_of_process()
    assert {name for name in before if before[name] != after[name]} <= set(others)


def test_trainings(small_run, monkeypatch):
    """The second training logs to its own project, and computes in its own precision."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(small_run().parent))
    projects = []

    def finish() -> None:
        projects.append(wandb.run.project)
        actual_finish()

    actual_finish = wandb.finish
    monkeypatch.setattr(wandb, "finish", finish)
    of_wandb = dict(train_iters=2, checkpoint_factor=1, eval_iters=0, use_wandb=True)
    bfloat16 = dict(precision="bfloat16", zero_optimization={"stage": 1})
    with unchanged("signals", "warnings", "streams"):  # which wandb changes
        train_hf.main([str(small_run("a", wandb_project="first", **bfloat16, **of_wandb))])
        train_hf.main([str(small_run("b", wandb_project="second", **of_wandb))])
    assert projects == ["first", "second"]
    assert AcceleratorState._shared_state["_mixed_precision"] == "no"


def test_a_resumed_training_and_conversions(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = write_tokenizer(tmp_path / "words.json", ("<|endoftext|>", "<|padding|>"))
    write(tmp_path / "neox", Model(), 2, 1, words)
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3")
    short = dict(eval_iters=0, checkpoint_factor=2, lr_decay_iters=16)
    with unchanged():
        train_hf.main([str(small_run(train_iters=2, **short))])
        train_hf.main([str(small_run(train_iters=4, **short))])
        neox_to_hf(tmp_path / "neox", tmp_path / "hf")
        hf_to_neox(tmp_path / "hf", tmp_path / "imported", 2, 0)
        reshape_neox(tmp_path / "neox", tmp_path / "reshaped", 1, 0)
        prepare = ["--tokenizer", str(words), "--output", str(tmp_path / "data")]
        prepare_data.main([str(text), *prepare])
    assert "going on from" in capsys.readouterr().out
