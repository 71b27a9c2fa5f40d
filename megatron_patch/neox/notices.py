"""Lines that the plugin prints: about settings that do what they say, where a user may expect
something else, and about what a training does."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_patch.neox.packages import is_installed
from megatron_patch.neox.settings import export_warning
from megatron_patch.steps import STEP, latest_step


def say(line: str) -> None:
    """Prints a line, on the first rank alone."""
    rank = str(dist.get_rank()) if dist.is_initialized() else os.environ.get("RANK", "0")
    if rank == "0":
        print(f"MetaLA: {line}", flush=True)


def notices(args: Any) -> Iterator[str]:
    """Yields the lines about a training, from the settings that the launcher has expanded."""
    if warning := export_warning(args):  # before the first step, not after weeks
        yield warning
    yield from _of_wandb(args)
    if args.tensorboard_dir and not is_installed("tensorboard"):
        yield "tensorboard_dir: nothing is logged there without the package tensorboard"
    yield from _of_exit_interval(args)


def _of_wandb(args: Any) -> Iterator[str]:
    from megatron.utils import get_wandb_api_key

    is_off = os.environ.get("WANDB_MODE") == "disabled"
    if args.use_wandb and not args.wandb_init_all_ranks and not is_off:
        if get_wandb_api_key(neox_args=args) is None:
            yield (
                f"use_wandb: nothing is logged to wandb, since there is no key for "
                f"{args.wandb_host}; `wandb login` stores one, WANDB_MODE=offline needs none"
            )


def _of_exit_interval(args: Any) -> Iterator[str]:
    from megatron.training import is_save_iter

    if not (args.save and args.exit_interval):
        return
    start = 0
    if args.load and not args.finetune:
        with contextlib.suppress(ValueError):  # no checkpoint to go on from
            start = args.iteration or int(STEP.fullmatch(latest_step(Path(args.load)).name)[1])
    end = (start // args.exit_interval + 1) * args.exit_interval
    if end < (args.train_iters or math.inf) and not is_save_iter(args, end):
        yield (
            f"exit_interval: the run ends at iteration {end} without a checkpoint, since "
            "checkpoint_factor and extra_save_iters write none there"
        )
