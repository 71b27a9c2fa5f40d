"""Ranks that another launcher starts than DeepSpeed's own: Slurm's, or one of MPI."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

from megatron_patch.architecture import SettingsError

# What launchers tell a rank: its number, that on its host, and how many there are on the host, for
# which Slurm has a list of all hosts. The last may be what GPT-NeoX has set in `deepy.py`.
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", None),
    ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


def check_launcher(args, hosts: int) -> None:
    """Checks what the ranks of several hosts need to find each other.

    Args:
        args: GPT-NeoX's settings in the launcher.
        hosts: the number of hosts.

    Raises:
        SettingsError: names the setting, package or variable.
    """
    if not (hosts > 1 or args.force_multi or args.deepspeed_slurm or args.deepspeed_mpi):
        return  # DeepSpeed's own launcher, whatever `launcher` says
    is_mpi = args.launcher in ("openmpi", "mvapich")
    for name, wanted in (("deepspeed_slurm", args.launcher == "slurm"), ("deepspeed_mpi", is_mpi)):
        if (found := bool(getattr(args, name))) != wanted:
            raise SettingsError(
                f"{name}: found {str(found).lower()}, wanted {str(wanted).lower()} with "
                f"launcher: {args.launcher}"
            )
    if is_mpi and find_spec("mpi4py") is None:
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
    """Gives a rank of another launcher the variables that DeepSpeed's own gives: `LOCAL_SIZE` may
    be that of `deepy.py`, which all launchers hand on."""
    if "CROSS_SIZE" in os.environ:  # it is DeepSpeed's own
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
    """The number of tasks on this node, from a list such as `2(x3),1`."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        tasks: list[str] = []
        for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get(name, "")):
            tasks += [number] * int(times or 1)
        node = int(os.environ.get("SLURM_NODEID", "0"))
        if node < len(tasks):
            return tasks[node]
    return None
