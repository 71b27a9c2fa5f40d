"""How the processes of a run start, how many there are, and how they end.

`deepy.py` starts DeepSpeed's launcher, and that starts the ranks. Several things go wrong there:

- Without a hostfile GPT-NeoX counts the machine's GPUs and derives batch size, data order and
  schedule from that number, whatever `num_gpus`, `include` and `exclude` leave of them.
- Ranks that Slurm or MPI starts read variables that only DeepSpeed's launcher sets.
- GPT-NeoX ends many failures with a printed line and `exit()`, whose exit code is 0. It also trains
  nothing, without a word, where it finds no data to train on.
- DeepSpeed's launcher exits with 0 where a signal has killed what it started.
- The ranks learn nothing when `deepy.py` is terminated or killed, and train on beside the next run.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

from megatron_patch.architecture import SettingsError, refuse
from megatron_patch.neox.packages import is_installed
from megatron_patch.neox.patching import in_metala_runs, repairs
from megatron_patch.neox.upstream_fixes.batches import check_parts
from megatron_patch.neox.upstream_fixes.cpu_mode import ACCELERATOR
from megatron_patch.neox.upstream_fixes.devices import choose_devices
from megatron_patch.neox.upstream_fixes.saving import HOLDER
from megatron_patch.neox.upstream_fixes.watchdog import VARIABLE as WATCHDOG_SECONDS

# ---- How many ranks run


def count_ranks(args) -> int:
    """Sets `global_num_gpus`, before GPT-NeoX derives other settings from it, to the number of
    ranks that DeepSpeed's launcher will start. Returns the number of hosts. Raises a SettingsError
    if the settings give another number, or hosts or slots that do not exist."""
    devices = choose_devices(args)
    if args.autotuning_run is not None:
        return 1  # DeepSpeed varies the number
    ranks = sum(map(len, devices.values()))
    if not ranks:
        raise SettingsError(
            "distributed_backend: found no GPU, wanted one, or gloo, which trains on the CPU"
        )
    if args.global_num_gpus not in (None, ranks):
        wanted = f"{ranks} (or none), as many as num_gpus, include, exclude and hostfile start"
        refuse("global_num_gpus", args.global_num_gpus, wanted)
    args.global_num_gpus = ranks
    return len(devices)


def check_running_ranks(args) -> None:
    """Ends a rank if other ranks run than were counted. The first rank prints why."""
    if args.autotuning_run is None and args.world_size != args.global_num_gpus:
        message = (
            f"MetaLA: global_num_gpus: found {args.global_num_gpus}, from which batch size and "
            f"data order follow, wanted {args.world_size}, the number of ranks that run"
        )
        sys.exit(message if args.rank == 0 else 1)


# megatron/neox_arguments/arguments.py:908
@repairs(
    "number of ranks",
    "megatron.neox_arguments.arguments:NeoXArgs.calculate_derived",
    "global_num_gpus = torch.cuda.device_count()",
)
def check_ranks_before_training() -> None:
    """Compares the counted ranks with the running ones at the start of `pretrain`."""
    from megatron.training import pretrain

    @in_metala_runs(pretrain)
    def pretrain_on_counted_ranks(pretrain, neox_args):
        check_running_ranks(neox_args)
        return pretrain(neox_args)


# ---- Launchers other than DeepSpeed's own

# The variables that launchers set for a rank: its number, its number on the host, and the number of
# ranks on the host. Slurm gives the last as a list for all nodes. GPT-NeoX's `deepy.py` may have
# set the last line's variables itself.
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", None),
    ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


def check_launcher(args, hosts: int) -> None:
    """Checks in the launcher what the ranks of several hosts need to find each other. Raises a
    SettingsError if a setting, package or variable is missing or wrong."""
    if not (hosts > 1 or args.force_multi or args.deepspeed_slurm or args.deepspeed_mpi):
        return  # DeepSpeed's own launcher runs, whatever `launcher` says
    is_mpi = args.launcher in ("openmpi", "mvapich")
    for name, wanted in (("deepspeed_slurm", args.launcher == "slurm"), ("deepspeed_mpi", is_mpi)):
        if (found := bool(getattr(args, name))) != wanted:
            raise SettingsError(
                f"{name}: found {str(found).lower()}, wanted {str(wanted).lower()} with "
                f"launcher: {args.launcher}"
            )
    if is_mpi and not is_installed("mpi4py"):
        raise SettingsError(
            f"launcher: found {args.launcher}, wanted the package mpi4py for it, which is not "
            "installed: the extra `mpi` brings it"
        )
    if args.launcher == "slurm":
        has_tasks = "SLURM_NTASKS" in os.environ or "SLURM_NTASKS_PER_NODE" in os.environ
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ and not (name == "SLURM_NTASKS" and has_tasks):
                wanted = "a job of Slurm with a number of tasks around deepy.py"
                if name.startswith("MASTER"):
                    wanted = "that of the first rank, exported in the job's script"
                raise SettingsError(f"{name}: found none in the environment, wanted {wanted}")


def name_rank() -> None:
    """Sets the variables of DeepSpeed's launcher for a rank that another launcher started. It
    replaces LOCAL_SIZE, which may be the one of `deepy.py`: all launchers hand it on."""
    if "CROSS_SIZE" in os.environ:  # DeepSpeed's own launcher started this rank
        return
    for rank, local_rank, local_size in _VARIABLES:
        if rank in os.environ and local_rank in os.environ:
            size = os.environ.get(local_size) if local_size else _slurm_tasks()
            os.environ |= {"RANK": os.environ[rank], "LOCAL_RANK": os.environ[local_rank]}
            os.environ.pop("LOCAL_SIZE", None)
            if size:
                os.environ["LOCAL_SIZE"] = size
            return


def _slurm_tasks() -> str | None:
    """Returns the number of tasks on this node, from a list such as `2(x3),1`."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        tasks: list[str] = []
        for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get(name, "")):
            tasks += [number] * int(times or 1)
        node = int(os.environ.get("SLURM_NODEID", "0"))
        if node < len(tasks):
            return tasks[node]
    return None


# ---- Exit codes


def end_run(message: str) -> NoReturn:
    """Ends this process with exit code 1. The first rank prints the message."""
    sys.exit(f"MetaLA: {message}" if os.environ.get("RANK", "0") == "0" else 1)


# megatron/training.py:883 to 970
@repairs("exit codes", "megatron.training", " exit()")
def fail_where_it_failed() -> None:
    """Gives the failures of GPT-NeoX's programs exit code 1."""
    from megatron import training

    def fail(original: Callable, is_done: Callable[[Any], bool] = lambda neox_args: False) -> None:
        @in_metala_runs(original)
        def run(original, neox_args, *args, **kwargs):
            try:
                return original(neox_args, *args, **kwargs)
            except SettingsError as error:
                end_run(str(error))
            except SystemExit as end:
                if end.code not in (None, 0) or is_done(neox_args):
                    raise
            end_run("GPT-NeoX ended the run, for the reason that it printed above")

    def is_at_exit_interval(neox_args: Any) -> bool:
        interval = neox_args.exit_interval
        return bool(interval) and neox_args.iteration % interval == 0

    fail(training.initialize_megatron)
    fail(training.setup_model_and_optimizer)
    fail(training.pretrain, is_at_exit_interval)

    @in_metala_runs(training.build_train_valid_test_data_loaders)
    def build_loaders_with_training_data(build_loaders, neox_args, *args, **kwargs):
        loaders = build_loaders(neox_args, *args, **kwargs)
        try:
            check_parts(neox_args, loaders)
        except SettingsError as error:
            end_run(str(error))
        return loaders


# ---- Processes that end with each other

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ChildProcess(subprocess.Popen):
    """A process that gets this one's SIGINT and SIGTERM, and ends when this one is killed. If
    signal n ends it, its exit code is 128 + n, as in a shell."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, preexec_fn=_end_with_parent, **kwargs)
        self.passed_on = 0
        # DeepSpeed sets handlers of its own after this if it starts processes by pdsh.
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
    """Asks Linux to send this process a signal when its parent dies. Other systems have no such
    call; there a killed parent leaves its children running."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, number)


# deepspeed/launcher/runner.py:639. https://github.com/deepspeedai/DeepSpeed/issues/618 was mended
# for failing scripts alone.
@repairs("killed launchers", "deepspeed.launcher.runner:main", "if result.returncode > 0")
def fail_where_launched_was_killed() -> None:
    """Lets `deepy.py` start DeepSpeed's launcher as a `ChildProcess`: DeepSpeed passes on positive
    exit codes alone."""
    from deepspeed.launcher import runner

    runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": ChildProcess})
    # For ranks that pdsh or srun start. DeepSpeed writes the values into a command without care for
    # blanks and commas, so values with others than these characters are left out.
    of_wandb = [
        name
        for name, value in os.environ.items()
        if name.startswith("WANDB_") and re.fullmatch(r"[\w.:/@+-]+", value)
    ]
    for variable in (HOLDER, WATCHDOG_SECONDS, ACCELERATOR, *of_wandb):
        if variable not in runner.EXPORT_ENVS:
            runner.EXPORT_ENVS.append(variable)


def end_with_launcher() -> None:
    """Lets a rank that DeepSpeed's launcher started on this host end when the launcher is killed.

    Other launchers, such as Slurm's, end their ranks themselves. They may also fork in a thread,
    and Linux would take the end of that thread for the parent's death.
    """
    if "CROSS_RANK" not in os.environ:
        return
    _end_with_parent(signal.SIGKILL)
    try:
        parent = " ".join(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        parent = ""
    if "deepspeed.launcher.launch" not in parent:  # it was killed before
        sys.exit(1)
