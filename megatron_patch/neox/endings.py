"""A run that fails must not end as one that succeeded, and one that is ended must end.

GPT-NeoX ends many failures by a printed line and `exit()`, whose exit code is 0, trains nothing
without a word where it finds no data to train on, and DeepSpeed's launcher exits with 0 where a
signal has killed what it started. `deepy.py` starts DeepSpeed's launcher, and that the ranks, of
which none is told when `deepy.py` is terminated or killed: they trained on, beside the next run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

from megatron_patch.neox.save_lock import HOLDER
from megatron_patch.neox.watchdog import VARIABLE as WATCHDOG_SECONDS


def end_run(message: str) -> NoReturn:
    """Ends this process with exit code 1 and, on the first rank, one line."""
    sys.exit(f"MetaLA: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def fail_where_it_failed(is_concerned: Callable[[Any], bool], replace: Callable) -> None:
    """Gives failures of GPT-NeoX's programs exit code 1.

    Args:
        is_concerned: whether the run of these settings is one to change.
        replace: function (original, replacement) that rebinds a function of GPT-NeoX.
    """
    from megatron import training
    from megatron.text_generation_utils import generate_samples_interactive

    build_loaders = training.build_train_valid_test_data_loaders

    def fail(original: Callable, is_done: Callable[[Any], bool] = lambda neox_args: False) -> None:
        @functools.wraps(original)
        def run(neox_args, *args, **kwargs):
            try:
                return original(neox_args, *args, **kwargs)
            except SystemExit as end:
                if end.code not in (None, 0) or not is_concerned(neox_args) or is_done(neox_args):
                    raise
            end_run("GPT-NeoX ended the run, for the reason that it printed above")

        replace(original, run)

    def is_at_exit_interval(neox_args: Any) -> bool:
        interval = neox_args.exit_interval
        return bool(interval) and neox_args.iteration % interval == 0

    @functools.wraps(build_loaders)
    def build_loaders_with_training_data(neox_args, *args, **kwargs):
        loaders = build_loaders(neox_args, *args, **kwargs)
        if is_concerned(neox_args) and not neox_args.do_train:
            end_run(f"split: found {neox_args.split!r}, wanted a share of documents to train on")
        return loaders

    @functools.wraps(generate_samples_interactive)
    def generate_until_interrupted(neox_args, *args, **kwargs):
        generate_samples_interactive(neox_args, *args, **kwargs)
        if is_concerned(neox_args):  # it returns at a prompt that is too long, and has said so
            end_run(f"seq_length: found {neox_args.seq_length}, wanted more than the prompt has")

    fail(training.initialize_megatron)
    fail(training.setup_model_and_optimizer)
    fail(training.pretrain, is_at_exit_interval)
    replace(build_loaders, build_loaders_with_training_data)
    replace(generate_samples_interactive, generate_until_interrupted)


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Child(subprocess.Popen):
    """A process that ends with this one, be this killed, and to which SIGINT and SIGTERM are passed
    on. Ended by signal n, it has the exit code 128 + n, as for a shell."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, preexec_fn=_end_with_parent, **kwargs)
        self.passed_on = 0
        # DeepSpeed sets its own after this where it starts processes by pdsh.
        ends = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self._pass_on) for number in ends}

    def _pass_on(self, number: int, frame: Any) -> None:
        self.passed_on = number
        self.terminate()

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.passed_on:
            self.returncode = code = 128 + self.passed_on
        elif code < 0:
            self.returncode = code = 128 - code
        return code


def _end_with_parent(number: int = signal.SIGTERM) -> None:
    """Linux alone: on others, what SIGKILL leaves behind goes on."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, number)


def fail_where_the_launched_was_killed() -> None:
    """DeepSpeed's launcher starts them, and passes on positive exit codes alone."""
    from deepspeed.launcher import runner

    runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _Child})
    for variable in (HOLDER, WATCHDOG_SECONDS):  # for ranks on other hosts
        if variable not in runner.EXPORT_ENVS:
            runner.EXPORT_ENVS.append(variable)


def end_with_launcher() -> None:
    """Lets a rank that DeepSpeed's launcher started on this host end when that is killed. Others,
    such as Slurm's, end what they start, and may fork in a thread, whose end would count."""
    if "CROSS_RANK" not in os.environ:
        return
    _end_with_parent(signal.SIGKILL)
    try:
        is_there = "deepspeed.launcher.launch" in " ".join(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        is_there = False
    if not is_there:  # it was killed before
        sys.exit(1)
