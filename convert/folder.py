"""Output folders that are either absent or complete, also where the process is killed.

A folder is written under a temporary name beside its target, `.NAME.partial-…`, flushed to the disk
and renamed. One that it replaces is called `.NAME.old-…` for a moment. Whoever works on such a
folder holds a lock on it, which ends with the process: the next run tells what a killed one left
from what a running one writes, removes the former, and puts back a folder that was being replaced.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
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
        ConvertError: `target` may not be written, see `check_target`, or writing failed.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle_leftovers(target)
        check_target(target, overwrite, mark)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written: {error}") from None
    try:
        with _locked(temporary):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _flush(*temporary.rglob("*"), temporary)
            check_target(target, overwrite, mark)
            is_current = target.exists() and target.samefile(".")
            _take_place(temporary, target)
            if is_current:  # relative paths would lead nowhere from the folder that was replaced
                os.chdir(target)
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, target: Path) -> None:
    if not target.exists() or _is_empty_folder(target):
        os.rename(temporary, target)  # replaces an empty folder
        _flush(target.parent)
        return
    with _locked(target):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(old, target)
            raise
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _settle_leftovers(target: Path) -> None:
    """Clears away what killed processes left beside `target`, and says so."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-\w{{8}}")
    for path in sorted(target.parent.iterdir()):
        found = name.fullmatch(path.name)
        # An empty folder may be one that its maker has not locked yet.
        if not found or not path.is_dir() or _is_empty_folder(path):
            continue
        with _locked(path) as is_locked:
            if not is_locked:
                print(f"note: {path} belongs to another conversion", file=sys.stderr)
            elif found[1] == "old" and not target.exists():
                os.rename(path, target)
                print(f"note: {target} was put back after a killed conversion", file=sys.stderr)
            else:
                shutil.rmtree(path)
                print(f"note: removed {path}, left by a killed conversion", file=sys.stderr)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder against `_settle_leftovers` of other processes, whatever its name becomes;
    gives False where it is locked already, or where the file system has no locks."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except OSError:
        is_locked = False
    try:
        yield is_locked
    finally:
        os.close(file)


def _flush(*paths: Path) -> None:
    """Has files, and the entries of folders, written to the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
