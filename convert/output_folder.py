"""Output folders that are either absent or complete, even if the process is killed.

A folder is written under a temporary name beside its target, `.NAME.partial-HOST-PID-…`, flushed to
the disk and renamed. A folder that it replaces is called `.NAME.old-HOST-PID-…` for a moment. The
writing process holds a file lock on both, which the kernel releases when the process ends. So the
next conversion on the same host can tell the leftovers of a killed process: it removes partial
folders, and puts back a folder that was being replaced.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from convert.command import ConvertError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<host>[\w.]+)-(?P<pid>\d+)-\w{8}")


def check_target(target: Path, overwrite: bool, check: Callable[[Path], None]) -> None:
    """Checks, before any work is done, that `target` is absent or empty, or that `overwrite` allows
    to replace it and `check` does not raise, which tells whether a conversion wrote it. Raises a
    ConvertError otherwise."""
    try:
        target.resolve()
        if not target.exists() or _is_empty_folder(target):
            return
    except (OSError, RuntimeError) as error:  # a name that is too long, a circle of links
        raise ConvertError(f"{target}: cannot be written: {error}") from None
    if not overwrite:
        raise ConvertError(f"{target} exists already; --overwrite replaces it")
    check(target)


@contextmanager
def complete_folder(target: Path, overwrite: bool, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `target` when the block ends, and is removed when
    the block raises. Raises a ConvertError if `check_target` does, or if writing failed."""
    check_target(target, overwrite, check)
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        check_target(target, overwrite, check)
        temporary = _temporary(target, "partial")
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written: {error}") from None
    try:
        with _locked(temporary):
            yield temporary
            _flush(*temporary.rglob("*"), temporary)
            check_target(target, overwrite, check)
            is_current = target.exists() and target.samefile(".")
            _replace(temporary, target)
            if is_current:  # the replaced folder is deleted, and relative paths start there
                os.chdir(target)
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists() or _is_empty_folder(target):
        os.rename(temporary, target)  # replaces an empty folder
        _flush(target.parent)
        return
    with _locked(target):
        old = _temporary(target, "old")
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(old, target)
            raise
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _temporary(target: Path, kind: str) -> Path:
    """Makes a folder beside `target`, whose name holds its kind, host and process."""
    name = f".{target.name}.{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder = target.with_name(name)
    folder.mkdir()
    return folder


def _clean_up(target: Path) -> None:
    """Cleans up after killed processes in the folder of `target`, and prints what it did."""
    for path in sorted(target.parent.iterdir()):
        found = LEFTOVER.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        is_ours = found["name"] == target.name
        try:
            if _is_dead(path, found):
                _restore_or_remove(path, target.with_name(found["name"]), found["kind"])
            elif is_ours and not _is_empty_folder(path):
                where = f" on {found['host']}" if found["host"] != _host() else ""
                print(f"note: {path} belongs to another conversion{where}", file=sys.stderr)
        except FileNotFoundError:
            pass  # its conversion has just ended
        except OSError as error:  # it belongs to another user
            print(f"note: {path} cannot be removed: {error.strerror}", file=sys.stderr)


def _is_dead(path: Path, found: re.Match) -> bool:
    """Returns whether the process that made a leftover is known to be gone."""
    if found["host"] != _host():
        return False
    with _locked(path) as is_locked:
        # A new process may not have locked its folder yet.
        if is_locked is None or _is_empty_folder(path):
            return not _is_running(int(found["pid"]))
        return is_locked


def _restore_or_remove(path: Path, target: Path, kind: str) -> None:
    if kind == "old" and not target.exists():
        os.rename(path, target)
        print(f"note: {target} was put back after a killed conversion", file=sys.stderr)
    else:
        shutil.rmtree(path)
        print(f"note: removed {path}, left by a killed conversion", file=sys.stderr)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Locks a folder, also under later names, against `_clean_up` of other processes. Yields True
    if this process now holds the lock, False if another does, `None` if that is unknown: the folder
    belongs to another user, or the file system has no locks."""
    with ExitStack() as stack:
        try:
            file = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except FileNotFoundError:
            raise
        except BlockingIOError:
            is_locked = False
        except OSError:
            is_locked = None
        yield is_locked


def _flush(*paths: Path) -> None:
    """Writes files, and the entries of folders, to the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
