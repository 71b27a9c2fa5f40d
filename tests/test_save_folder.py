"""A run refuses a save folder that it cannot write to, or that another run holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_patch import save_folder
from megatron_patch.architecture import SettingsError
from megatron_patch.save_folder import LOCK, held, holder, try_saving


@pytest.fixture
def save(tmp_path):
    return tmp_path / "a" / "save"


def is_refused(save, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused, held(str(save)):
        pass
    assert "\n" not in str(refused.value)


def test_a_folder_is_made_held_and_left_empty(save):
    with held(str(save)) as run:
        assert holder(str(save)) == run
        assert {path.name for path in save.iterdir()} == {LOCK}
        is_refused(
            save, f"save: found {save} in use by process {os.getpid()} on .* folder of its own"
        )
    assert not list(save.iterdir())
    assert holder(str(save)) is None
    with held(str(save)):
        pass


def make_file(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda save: make_file(save),
        lambda save: make_file(save.parent),
        lambda save: (save / "latest").mkdir(parents=True),
        lambda save: make_file(save / "global_step10"),
        lambda save: (save.parent.mkdir(), save.symlink_to("/nowhere/else")),
        lambda save: (save.parent.mkdir(), save.symlink_to("/proc")),
        lambda save: (save.parent.mkdir(), save.symlink_to("/sys")),
        lambda save: (save.parent.mkdir(), save.symlink_to(save)),
    ],
)
def test_what_cannot_be_written_is_refused(save, spoil):
    spoil(save)
    is_refused(save, f"save: found {save}, wanted a folder that can be written to from ")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_what_is_no_name_is_refused(tmp_path, name):
    is_refused(tmp_path / name, "save: found .*, wanted a folder that can be written to")


def test_a_full_disk_is_found(save, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError, match="wanted a folder .*: No space left on device"):
        try_saving(str(save))
    assert not list(save.iterdir())


def leave(save, **changes) -> None:
    """Writes the lock of a run that was killed on another host a minute ago."""
    save.mkdir(parents=True)
    age = changes.pop("age", 60)
    run = {"host": "node7", "pid": 1, "job": None, "restart": None, "run": "node7:1:0", **changes}
    (save / LOCK).write_text(json.dumps(run))
    then = time.time() - age
    os.utime(save / LOCK, (then, then))


def test_another_hosts_run_is_believed_while_it_gives_signs_of_life(save):
    leave(save, job="55")
    lock = save / LOCK
    is_refused(
        save, rf"in use by process 1 on node7, job 55, .* if it has ended, remove {lock}, or"
    )
    assert lock.exists()
    lock.unlink()
    with held(str(save)):
        pass


def test_a_run_without_signs_of_life_has_ended(save):
    leave(save, age=save_folder.DEAD_AFTER_SECONDS + 1)
    with held(str(save)):
        assert holder(str(save)) != "node7:1:0"


@pytest.mark.parametrize(("restart", "is_free"), [("1", True), ("0", False)])
def test_a_job_that_slurm_queued_again_takes_its_folder(save, monkeypatch, restart, is_free):
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    leave(save, job="55", restart="0")
    if not is_free:
        is_refused(save, "in use by process 1 on node7, job 55")
        return
    with held(str(save)):
        pass


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"host": "node7"}', "\0"])
def test_a_lock_that_says_nothing_is_no_trap(save, text):
    leave(save)
    (save / LOCK).write_text(text)
    if text:
        is_refused(save, "in use by ")
    then = time.time() - 1000
    os.utime(save / LOCK, (then, then))
    with held(str(save)):
        pass


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/etc/passwd"), os.mkfifo, os.mkdir])
def test_a_lock_is_a_regular_file(save, make):
    save.mkdir(parents=True)
    make(save / LOCK)
    is_refused(save, f"save: {save / LOCK}: ")


KILLED = """
import os, signal, sys
from megatron_patch.save_folder import held
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free_at_once(save):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(save)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        is_refused(save, f"in use by process {process.pid} on .*, wanted a folder of its own")
        process.kill()
    with held(str(save)):
        pass


def test_file_systems_without_locks_go_by_signs_of_life(save, monkeypatch):
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(save_folder.fcntl, "flock", none)
    monkeypatch.setattr(save_folder, "BEAT_SECONDS", 0.1)
    with held(str(save)):
        is_refused(save, "which gave a sign of life . s ago; if it has ended, remove")
        os.utime(save / LOCK, (0, 0))
        deadline = time.monotonic() + 20
        while (save / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        is_refused(save, "which gave a sign of life . s ago")


def test_another_runs_lock_is_not_removed(save):
    with held(str(save)):
        (save / LOCK).unlink()
        (save / LOCK).write_text("another's")
    assert (save / LOCK).read_text() == "another's"


def test_a_lock_that_is_no_file_is_refused_and_closed(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SettingsError, match="found no regular file"):
        held(str(tmp_path)).__enter__()
    assert len(os.listdir("/proc/self/fd")) == before
