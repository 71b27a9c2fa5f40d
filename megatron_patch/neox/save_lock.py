"""The folder `save` of a run: the launcher holds it, and ranks save there as long as it does."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.run_checks import program
from megatron_patch.save_folder import held, holder, try_saving

HOLDER = "METALA_HOLDER"  # names the run to its ranks


def hold_save(args: Any) -> None:
    """Holds `save` for as long as this process lives, the launcher. SIGTERM ends it as Ctrl-C does.

    Raises:
        SettingsError: nothing can be saved or uploaded, or another run holds the folder.
    """
    if not args.save or not args.user_script or program(args) != "train.py":
        return
    for package in ("boto3", "hf_transfer") if args.s3_path else ():
        if find_spec(package) is None:
            raise SettingsError(
                f"s3_path: found {args.s3_path}, wanted none without the package {package}, with "
                "which GPT-NeoX uploads checkpoints"
            )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    until_the_end = ExitStack()
    os.environ[HOLDER] = until_the_end.enter_context(held(args.save))
    atexit.register(until_the_end.close)


def check_save(args: Any) -> None:
    """Ends the run if a rank cannot write to `save`, which may be another folder on its host. Every
    rank calls it, after torch.distributed is initialised.

    Raises:
        SystemExit: on every rank.
    """
    if not args.save or program(args) != "train.py":
        return
    reason = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            try_saving(args.save)
        except SettingsError as error:
            reason = str(error)
    _end_all_if(reason)


def check_holder(save: str) -> None:
    """Ends the run if another one has taken over `save`, where the launcher was lost with its host,
    or somebody removed the lock. Every rank calls it before it saves.

    Raises:
        SystemExit: on every rank.
    """
    reason = None
    if dist.get_rank() == 0 and HOLDER in os.environ:
        if (found := holder(save)) not in (None, os.environ[HOLDER]):
            reason = f"save: {save} is now another run's, {found}; no checkpoint was written"
    _end_all_if(reason)


def _end_all_if(reason: str | None) -> None:
    if reason:
        print(f"MetaLA: {reason}", flush=True)
    anywhere = torch.tensor([int(reason is not None)], device=torch.cuda.current_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere.item():
        sys.exit(1)
