"""A run that was meant to go on from a checkpoint must not silently start anew."""

from __future__ import annotations

from pathlib import Path

from megatron_patch.neox.settings import SettingsError


def check_load(args) -> None:
    """Checks that the checkpoint a run asks for by `load` is there.

    GPT-NeoX prints a line and trains from scratch where it is not. Only one case is a first start
    and not a mistake: `load` and `save` name the same folder and it holds no checkpoint yet, the
    usual way to have one command that starts and resumes.

    Raises:
        SettingsError: names the folder, what was found there and what was wanted.
    """
    if args.load is None:
        return
    folder = Path(args.load)
    saved = sorted(p.name for p in folder.glob("global_step*")) if folder.is_dir() else []
    if args.iteration is not None:
        wanted = f"global_step{args.iteration}"
        if wanted not in saved:
            raise SettingsError(
                f"load: found {saved or 'no checkpoint'} in {folder}, wanted {wanted}"
            )
        return
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text().strip()
        if not (folder / tag).is_dir():
            raise SettingsError(f"load: {latest} names {tag!r}, which is not there; found {saved}")
        return
    if saved:
        raise SettingsError(f"load: found {saved} in {folder}, wanted a file `latest` naming one")
    same_folder = args.save is not None and Path(args.save).resolve() == folder.resolve()
    if args.finetune or args.no_load_optim or not same_folder:
        raise SettingsError(f"load: found no checkpoint in {folder}, wanted one to go on from")
