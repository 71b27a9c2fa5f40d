"""On which devices the ranks of a run start.

A user chooses devices by a variable: CUDA_VISIBLE_DEVICES, or the accelerator's own. DeepSpeed's
launcher heeds it only if it is given no `num_gpus`, `include`, `exclude` or hostfile. Otherwise it
starts on the devices from 0 on, which may be somebody else's.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_patch.architecture import SettingsError, refuse
from megatron_patch.neox.upstream_fixes.cpu_mode import runs_on_cpu

HERE = "localhost"  # DeepSpeed's name of this machine where there is no hostfile


# In GPT-NeoX's own `configs/125M.yml`, for one machine.
_PLACEHOLDER = "/mock_path"


def hostfile(args) -> Path | None:
    """Returns the hostfile that DeepSpeed's launcher will read, `None` if there is none."""
    from deepspeed.launcher import runner

    # The variable comes last on the launcher's command line, so it wins.
    file = Path(os.environ.get("DLTS_HOSTFILE") or args.hostfile or runner.DLTS_HOSTFILE)
    return file if file.is_file() else None


def others_place_ranks(args) -> bool:
    """Returns whether Slurm or MPI starts the ranks. They choose the devices, or hand the variable
    on."""
    return bool(args.deepspeed_slurm or args.deepspeed_mpi)


def choose_devices(args) -> dict[str, list[int]]:
    """Returns the devices of each host on which DeepSpeed's launcher will start a rank.

    Without a hostfile they are the first `num_gpus` of the visible ones, or those of them that
    `include` and `exclude` leave. If the variable is set, it then names just these, and the three
    settings are taken away. Raises a SettingsError if there are no such hosts or devices, or if
    devices would run that the variable does not name.
    """
    from deepspeed.launcher import runner

    file = hostfile(args)
    if file is None and not others_place_ranks(args):
        for name, given in (
            ("DLTS_HOSTFILE", os.environ.get("DLTS_HOSTFILE")),
            ("hostfile", args.hostfile),
        ):
            if given and given != _PLACEHOLDER:
                refuse(name, given, "a file, or none: DeepSpeed would train on this machine alone")
    visible = _visible_devices(args, file)
    include, exclude = args.include or "", args.exclude or ""
    num_gpus = 0 if include or exclude else max(args.num_gpus or 0, 0)
    num_nodes = max(args.num_nodes or 0, 0)
    if file is None and num_nodes > 1:
        refuse("num_nodes", num_nodes, "a hostfile that names them")
    try:
        if file is None:
            hosts = {HERE: _devices_of_this_machine(args, visible)}
        else:
            slots = runner.fetch_hostfile(str(file))
            hosts = {host: list(range(number)) for host, number in slots.items()}
        chosen = runner.parse_resource_filter(hosts, include, exclude)
    except ValueError as error:
        seen = "" if visible is None else f" (beside {_variable()}={os.environ[_variable()]})"
        raise SettingsError(f"hostfile, include, exclude: {error}{seen}") from None
    chosen = dict(list(chosen.items())[: num_nodes or None])
    if num_gpus and (file is not None or others_place_ranks(args)):
        chosen = {host: list(range(num_gpus)) for host in chosen}
    elif num_gpus:
        if 0 < (found := len(chosen[HERE])) < num_gpus:
            refuse("num_gpus", num_gpus, f"at most {found}, as many as are visible")
        chosen = {HERE: chosen[HERE][:num_gpus]}
    if visible is not None and file is None:
        os.environ[_variable()] = ",".join(map(str, chosen.get(HERE, ())))
        args.num_gpus = args.include = args.exclude = None
        args.num_nodes = -1  # DeepSpeed does not take 1 beside the variable
    elif visible is not None:
        _check_slots(chosen, visible, file)
    return chosen


def _check_slots(chosen: dict[str, list[int]], visible: list[int], file: Path) -> None:
    """Checks that the devices that run by a hostfile are among the visible ones."""
    name = _variable()
    for host, devices in chosen.items():
        if not set(devices) <= set(visible):
            refuse(
                name,
                os.environ[name],
                f"none, or one with all of {','.join(map(str, devices))}, which run on {host}: "
                f"beside a hostfile ({file}) include and exclude choose the GPUs",
            )


def _visible_devices(args, file: Path | None) -> list[int] | None:
    """Returns the devices that the variable names, `None` if it is not set or says nothing about
    this run. Beside a hostfile DeepSpeed does not read it, and names that are no numbers pass."""
    name = _variable()
    found = os.environ.get(name)
    if not found or others_place_ranks(args) or runs_on_cpu(args):
        return None
    names = [part.strip() for part in found.split(",")]
    are_numbers = all(map(str.isdecimal, names))
    if not are_numbers and file is not None:
        return None
    if not are_numbers or len(set(map(int, names))) < len(names):
        wanted = "different numbers of GPUs, as nvidia-smi -L prints them: DeepSpeed reads no other"
        refuse(name, found, wanted)
    return list(map(int, names))


def _devices_of_this_machine(args, visible: list[int] | None) -> list[int]:
    """Returns the visible devices, all if nothing is said of them, none if there is no device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    count = accelerator.device_count
    if accelerator.device_name() == "cpu" and not (runs_on_cpu(args) or others_place_ranks(args)):
        count = torch.cuda.device_count  # DeepSpeed has found no GPU, and counts processors
    if visible is None:
        return list(range(count()))
    name = _variable()
    found = os.environ.pop(name)
    number = count()  # of all, for the variable is away
    os.environ[name] = found
    if number and max(visible) >= number:
        refuse(name, found, f"numbers below {number}, as this machine has {number} GPUs")
    return visible if number else []


def _variable() -> str:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().visible_devices_envs()[0]
