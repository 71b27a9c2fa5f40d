"""The watchdog names stopped and stuck ranks, and ends the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes import watchdog
from megatron_patch.neox.upstream_fixes.watchdog import VARIABLE, watchdog_seconds
from tests.neox.training import free_port

RANK = """
import sys, time
import torch.distributed as dist
from megatron_patch.neox.upstream_fixes import watchdog
rank, port, seconds, mode = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
store = dist.TCPStore("127.0.0.1", port, 3, rank == 0, wait_for_workers=True)
dog = watchdog.Watchdog(watchdog._connect, rank, 3, seconds)
print("watched", flush=True)
for step in range(10_000):
    if mode == "leave" and step == 20 + 20 * (rank == 0):
        break
    if not (mode == "stuck" and step + (rank == 2) > 20):
        dog.work()
    time.sleep(0.05)
dog.leave()
time.sleep(4 if rank == 0 else 0)  # rank 0 has the store
"""
SECONDS = 4


def start_ranks(mode: str) -> list[subprocess.Popen]:
    port = str(free_port())
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, str(SECONDS), mode],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("mode", "stopped", "message"),
    [
        ("train", 2, "no sign of life for {} s from rank 2 on "),
        ("train", 0, "no sign of life for {} s from rank 0 on 127.0.0.1"),
        ("stuck", None, "no rank has got on for {} s, behind is rank 2 on "),
        ("leave", None, None),
    ],
)
def test_who_is_behind_is_named(mode, stopped, message):
    ranks = start_ranks(mode)
    try:
        for process in ranks:
            assert process.stdout.readline() == "watched\n"
        if stopped is not None:
            time.sleep(1)
            ranks[stopped].send_signal(signal.SIGSTOP)
        others = [process for rank, process in enumerate(ranks) if rank != stopped]
        outputs = [process.communicate(timeout=60)[0] for process in others]
        codes = {process.returncode for process in others}
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stdout.close()
    lines = "".join(outputs).splitlines()
    if message is None:
        assert codes == {0} and not lines
        return
    assert codes == {1}
    before, after = message.split("{}")
    warning, end = lines
    assert (
        warning.startswith(f"MetaLA: {before}") and f"ends at {SECONDS} s ({VARIABLE})" in warning
    )
    assert end.startswith(f"MetaLA: {before}") and after in end and "the run ends (" in end


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1e400"])
def test_a_time_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(SettingsError, match=f"{VARIABLE}: found '{text}', wanted a number of seco"):
        watchdog_seconds()


def test_the_time_can_be_set(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert watchdog_seconds() == 1800
    monkeypatch.setenv(VARIABLE, "60.5")
    assert watchdog_seconds() == 60.5
    monkeypatch.setenv(VARIABLE, "0")
    assert watchdog_seconds() is None


def test_a_run_behind_a_training_has_no_watchdog(monkeypatch):
    """An evaluation or a generation, in the process of the training."""
    made, left = [], []

    class Dog:
        def __init__(self, *_):
            made.append(self)

        def leave(self):
            left.append(self)

    training, generation = ModuleType("megatron.training"), ModuleType("generation")
    for name in ("initialize_megatron", "train_step", "forward_step", "save_checkpoint"):
        setattr(training, name, lambda neox_args: None)
    training.pretrain = lambda neox_args: training.initialize_megatron(neox_args)
    generation.forward_model = lambda: None
    package = ModuleType("megatron")
    package.training, package.text_generation_utils = training, generation
    for module in (package, training):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(watchdog.dist, name, lambda: 0)
    monkeypatch.setattr(watchdog, "Watchdog", Dog)
    watchdog.watch_ranks()
    args = SimpleNamespace(attention_config=["metala"])
    training.pretrain(args)
    training.initialize_megatron(args)
    assert len(made) == 1 and left == made
    training.pretrain(args)
    assert len(made) == 2 and left == made
