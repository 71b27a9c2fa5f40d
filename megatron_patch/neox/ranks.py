"""How many ranks will run, which GPT-NeoX derives batch size, data order and schedule from.

Without a hostfile GPT-NeoX counts the machine's GPUs, whatever `num_gpus`, `include` and `exclude`
leave of them.
"""

from __future__ import annotations

import os
import sys

from megatron_patch.architecture import SettingsError


def count_ranks(args) -> int:
    """Sets `global_num_gpus` to the number of ranks that DeepSpeed's launcher will start.

    Args:
        args: GPT-NeoX's settings in the launcher, before values are derived from them.

    Returns:
        the number of hosts.

    Raises:
        SettingsError: the settings give another `global_num_gpus`, or hosts or slots that are not
            there.
    """
    if args.autotuning_run is not None:
        return 1  # DeepSpeed varies the number
    of_hosts = _ranks_to_start(args)
    ranks = sum(of_hosts)
    if not ranks:
        raise SettingsError(
            "distributed_backend: found no GPU, wanted one, or gloo, which trains on the CPU"
        )
    if args.global_num_gpus not in (None, ranks):
        raise SettingsError(
            f"global_num_gpus: found {args.global_num_gpus}, wanted {ranks} (or none), as many as "
            "num_gpus, include, exclude and hostfile start"
        )
    args.global_num_gpus = ranks
    return len(of_hosts)


def _ranks_to_start(args) -> list[int]:
    """On each host. As `main` of `deepspeed.launcher.runner` chooses hosts and slots, from the
    arguments that GPT-NeoX gives it."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    include, exclude = args.include or "", args.exclude or ""
    num_gpus = 0 if include or exclude else max(args.num_gpus or 0, 0)
    num_nodes = max(args.num_nodes or 0, 0)
    try:
        # The environment's comes last on the launcher's command line.
        hosts = runner.fetch_hostfile(
            os.environ.get("DLTS_HOSTFILE") or args.hostfile or runner.DLTS_HOSTFILE
        )
        if not hosts:
            visible = os.environ.get(get_accelerator().visible_devices_envs()[0])
            if visible and not (include or exclude or num_gpus or num_nodes > 1):
                return [len(visible.split(","))]
            hosts = {"localhost": get_accelerator().device_count()}
        slots = runner.parse_inclusion_exclusion(hosts, include, exclude)
    except ValueError as error:
        raise SettingsError(f"hostfile, include, exclude: {error}") from None
    chosen = list(slots.values())[: num_nodes or None]
    return [num_gpus or len(of_host) for of_host in chosen]


def check_running_ranks(args) -> None:
    """Ends a rank, with one line from the first, if other ranks run than were counted."""
    if args.autotuning_run is None and args.world_size != args.global_num_gpus:
        message = (
            f"MetaLA: global_num_gpus: found {args.global_num_gpus}, from which batch size and "
            f"data order follow, wanted {args.world_size}, the number of ranks that run"
        )
        sys.exit(message if args.rank == 0 else 1)
