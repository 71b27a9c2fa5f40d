"""The folder that a run saves to: tested before the run starts, and locked by one run at a time.

The run holds a file lock on `run.lock`, which the kernel releases when its process ends. On a file
system that does not share locks between hosts, or has none, the age of the file decides instead:
the run touches it twice a minute.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_patch.architecture import SettingsError
from megatron_patch.steps import STEP

LOCK = "run.lock"
BEAT_SECONDS = 30
DEAD_AFTER_SECONDS = 300
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


def try_saving(save: str) -> float:
    """Makes the folder if needed, and writes a file to it, which is removed again. Returns the time
    in seconds by the clock of the folder's file system. Raises a SettingsError, which says why, if
    nothing can be saved there."""
    folder = Path(save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-") as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
            now = os.fstat(file.fileno()).st_mtime
        if (latest := folder / "latest").exists():
            latest.open("ab").close()
        for path in folder.iterdir():
            if STEP.fullmatch(path.name) and not (path.is_dir() and os.access(path, os.W_OK)):
                raise PermissionError(0, f"{path.name} is no folder that can be written")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"save: found {save}, wanted a folder that can be written to from "
            f"{socket.gethostname()}: {reason}"
        ) from None
    return now


@contextmanager
def held(save: str) -> Iterator[str]:
    """Locks the folder against other runs, and yields the name of this run, as `holder` returns it.
    Raises a SettingsError if nothing can be saved there, or another run holds it."""
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": next((os.environ[n] for n in JOB_VARIABLES if n in os.environ), None),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "start": try_saving(save),
    }
    own["run"] = f"{own['host']}:{own['pid']}:{own['start']:.0f}"
    path = Path(save) / LOCK
    descriptor = _take(path, own)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(own).encode(), 0)
    is_over = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, is_over), daemon=True)
    beat.start()
    try:
        yield own["run"]
    finally:
        is_over.set()
        if _is(path, descriptor):
            path.unlink()
        beat.join()
        os.close(descriptor)


def _take(path: Path, own: dict) -> int:
    """Returns the descriptor of the lock file, locked."""
    while True:
        try:
            descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
            )
        except OSError as error:
            raise SettingsError(f"save: {path}: cannot be opened: {error.strerror}") from None
        try:
            _check_free(path, descriptor, own)
        except SettingsError:
            os.close(descriptor)
            raise
        if _is(path, descriptor):
            return descriptor
        os.close(descriptor)  # a run that ended in the meantime has removed this file


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _check_free(path: Path, descriptor: int, own: dict) -> None:
    """Takes the file lock, if the file system has locks, and refuses a folder that another run
    holds."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SettingsError(f"save: {path}: found no regular file, wanted that of a run, or none")
    is_locked, reason = True, ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        reason = "wanted a folder of its own"
    except OSError:  # a file system without locks
        is_locked = False
    text = os.pread(descriptor, 4096, 0)
    other = _read(text)
    host, job, who = other.get("host"), other.get("job"), "another run"
    if host:
        who = f"process {other.get('pid')} on {host}" + (f", job {job}" if job else "")
    is_requeued = job and job == own["job"] and other.get("restart") != own["restart"]
    is_here = is_locked and host == own["host"]
    age = own["start"] - status.st_mtime
    if not reason and text and age < DEAD_AFTER_SECONDS and not is_requeued and not is_here:
        reason = (
            f"which gave a sign of life {max(age, 0):.0f} s ago; if it has ended, remove {path}, "
            f"or wait {DEAD_AFTER_SECONDS} s"
        )
    if reason:
        raise SettingsError(f"save: found {path.parent} in use by {who}, {reason}")


def _beat(descriptor: int, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_SECONDS):
        try:
            os.utime(descriptor)
        except OSError:  # the file system is not reachable, or the file was removed
            pass


def _read(text: bytes) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def holder(save: str) -> str | None:
    """Returns the name of the run that holds the folder, `None` if it is not known."""
    try:
        with (Path(save) / LOCK).open("rb") as file:
            return _read(file.read(4096)).get("run")
    except OSError:
        return None
