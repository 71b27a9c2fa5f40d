"""A run that was meant to go on from a checkpoint must not silently start anew, nor end in what
DeepSpeed says of files that it does not expect."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_patch.architecture import SettingsError


def check_load(args) -> None:
    """Checks that the checkpoint a run asks for by `load` is there, and can be loaded as the
    settings say.

    GPT-NeoX prints a line and trains from scratch where it is not there. Only one case is a first
    start and not a mistake: `load` and `save` name the same folder and it holds no checkpoint yet,
    the usual way to have one command that starts and resumes.

    Raises:
        SettingsError: names the folder or setting, what was found there and what was wanted.
    """
    is_training = Path(args.user_script or "train.py").name == "train.py"
    if is_training and args.no_load_optim:
        raise SettingsError(
            "no_load_optim: found true, wanted false: GPT-NeoX would train one of the model's "
            "tensors alone; finetune: true starts from the weights of a checkpoint"
        )
    if args.load is None:
        return
    step = _find_step(args)
    if step is not None:
        _check_states(args, step, is_training)


def _find_step(args) -> Path | None:
    """The `global_stepN` folder, `None` at a first start."""
    folder = Path(args.load)
    saved = sorted(p.name for p in folder.glob("global_step*")) if folder.is_dir() else []
    if args.iteration is not None:
        wanted = f"global_step{args.iteration}"
        if wanted not in saved:
            raise SettingsError(
                f"load: found {saved or 'no checkpoint'} in {folder}, wanted {wanted}"
            )
        return folder / wanted
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text().strip()
        if not (folder / tag).is_dir():
            raise SettingsError(f"load: {latest} names {tag!r}, which is not there; found {saved}")
        return folder / tag
    if saved:
        raise SettingsError(f"load: found {saved} in {folder}, wanted a file `latest` naming one")
    same_folder = args.save is not None and Path(args.save).resolve() == folder.resolve()
    if args.finetune or args.no_load_optim or not same_folder:
        raise SettingsError(f"load: found no checkpoint in {folder}, wanted one to go on from")
    return None


def _check_states(args, step: Path, is_training: bool) -> None:
    """By the first rank's file: whether its layout is that of the settings, and whether it has all
    that will be loaded. GPT-NeoX ends with exit code 0 where it misses the random states."""
    file = step / "mp_rank_00_model_states.pt"
    is_universal = (args.checkpoint or {}).get("load_universal")
    if os.environ.get("RANK", "0") != "0" or is_universal or not file.is_file():
        return
    try:
        # As DeepSpeed loads it, but mapped: tensors are not read.
        states = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    except Exception:  # DeepSpeed, which reads other files too, will say what is the matter
        return

    def refuse(setting: str, wanted: str) -> None:
        raise SettingsError(f"{setting}: found {getattr(args, setting)!r}, wanted {wanted}")

    another = f"as in {file}, or that checkpoint in another layout, by convert/reshape_neox.py"
    if (states.get("module") is None) != (args.pipe_parallel_size > 0):
        wanted = "at least 1" if states.get("module") is None else "0"
        refuse("pipe_parallel_size", f"{wanted}, {another}")
    saved = states.get("args", {}).get("model_parallel_size", args.model_parallel_size)
    if saved != args.model_parallel_size:
        refuse("model_parallel_size", f"{saved}, {another}")
    missing = []
    if is_training and states.get("lr_scheduler") is None:
        missing.append("optimizer")
    if not args.no_load_rng and "random_rng_state" not in states:
        missing.append("random")
    if missing and not args.finetune:
        refuse("finetune", f"True: {file} has no {' and no '.join(missing)} states")
