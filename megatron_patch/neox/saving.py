"""Checkpoints as GPT-NeoX writes them: the settings they depend on, and which are deleted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from megatron_patch.architecture import SettingsError


def check_saving(args) -> None:
    """Checks `save` and the settings beside it, and takes away the "/" at its end, with which
    GPT-NeoX finds no old checkpoints, and uploads all runs under one name.

    Raises:
        SettingsError: no checkpoints would be written, or all of them deleted.
    """
    if not args.save:
        return
    args.save = args.save.rstrip("/") or "/"
    factor = args.checkpoint_factor
    if factor is None and args.extra_save_iters is None:
        raise SettingsError(
            "checkpoint_factor: found none, wanted the number of steps from one checkpoint to the "
            "next (or extra_save_iters), since save is set"
        )
    if factor is None:
        return
    is_log = args.checkpoint_scale == "log"
    if not (factor > 1 if is_log else factor >= 1 and float(factor).is_integer()):
        wanted = "more than 1, with checkpoint_scale: log" if is_log else "a whole number >= 1"
        raise SettingsError(f"checkpoint_factor: found {factor!r}, wanted {wanted}")


def delete_old_checkpoints(save_dir: str, n_to_keep: int) -> None:
    """In place of GPT-NeoX's, which looks for "global_step" anywhere in the path, so that a
    `save` below such a folder loses whatever lies in it, and deletes the step just written where
    `save` holds later ones of a run that began anew."""
    if torch.distributed.get_rank() != 0:
        return
    folder = Path(save_dir)
    latest = _step((folder / "latest").read_text().strip())
    steps = sorted(step for path in folder.iterdir() if (step := _step(path.name)) is not None)
    for step in [step for step in steps if latest is None or step <= latest][:-n_to_keep]:
        print(f"MetaLA: keep_last_n_checkpoints: deleting {folder}/global_step{step}", flush=True)
        shutil.rmtree(folder / f"global_step{step}", ignore_errors=True)


def _step(name: str) -> int | None:
    match = re.fullmatch(r"global_step(\d+)", name)
    return int(match[1]) if match else None
