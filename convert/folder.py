"""Output folders that are either absent or complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.command import ConvertError


def check_target(target: Path, overwrite: bool, mark: str) -> None:
    """Checks that `target` may be written, before any work is done.

    Args:
        target: the folder to be.
        overwrite: whether a folder that is there may be replaced.
        mark: a file that a folder of the kind to be replaced holds; a folder without it is somebody
            else's, and is never removed.

    Raises:
        ConvertError: it may not.
    """
    if not target.exists() or _is_empty_folder(target):
        return
    if not overwrite:
        raise ConvertError(f"{target} exists already; --overwrite replaces it")
    if not (target / mark).is_file():
        raise ConvertError(f"{target} exists and holds no {mark}: not overwritten")


@contextmanager
def complete_folder(target: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which takes its place when the block ends well and
    is removed when it does not.

    Raises:
        ConvertError: `target` may not be written, see `check_target`.
    """
    target = target.resolve()
    check_target(target, overwrite, mark)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written: {error}") from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        check_target(target, overwrite, mark)
        _take_place(temporary, target)
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, target: Path) -> None:
    if not target.exists() or _is_empty_folder(target):
        os.rename(temporary, target)  # replaces an empty folder
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
