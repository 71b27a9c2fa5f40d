"""The iterations in a folder of GPT-NeoX checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

STEP = re.compile(r"global_step(0|[1-9][0-9]*)")


def saved_steps(folder: Path) -> list[int]:
    """Returns the sorted iterations N that have a folder `global_stepN`; an empty list if `folder`
    does not exist. Raises a ValueError if the folder cannot be read."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(int(found[1]) for name in names if (found := STEP.fullmatch(name)))


def latest_step(folder: Path) -> Path:
    """Returns the folder of the iteration that the file `latest` names. Raises a ValueError if
    there is no such file, or no such iteration."""
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder} has no file `latest`")
    try:
        with latest.open("rb") as file:
            name = file.read(256).decode("utf-8", "backslashreplace").strip()
    except OSError as error:
        raise ValueError(f"{latest}: cannot be read: {error.strerror}") from None
    found = STEP.fullmatch(name)
    if not found or int(found[1]) not in saved_steps(folder):
        raise ValueError(f"{latest} names {name!r}, which is not there")
    return folder / name
