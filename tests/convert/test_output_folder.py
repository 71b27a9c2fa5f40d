"""Output folders of killed processes: absent or complete, and cleaned up by the next run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from convert import output_folder
from convert.command import ConvertError
from convert.neox_to_hf import neox_to_hf
from convert.output_folder import complete_folder
from tests.convert.synthetic import Model, write

OLD = {"config.json": "old", "old.txt": "old"}
NEW = {"config.json": "new", "weights": "new" * 1000}
# Python's audit events for operations on the file system.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir"}


def has(mark: str) -> Callable[[Path], None]:
    """Returns a check that only lets a folder with a file of this name be replaced."""

    def check(folder: Path) -> None:
        if not (folder / mark).is_file():
            raise ConvertError(f"{folder} holds no {mark}")

    return check


def contents(folder: Path) -> dict[str, str] | None:
    if not folder.exists():
        return None
    return {path.name: path.read_text() for path in folder.iterdir()}


def write_new(target: Path) -> None:
    with complete_folder(target, overwrite=True, check=has("config.json")) as folder:
        for name, text in NEW.items():
            (folder / name).write_text(text)


def write_old(target: Path, files: dict[str, str] | None) -> None:
    """Writes a folder as an earlier conversion left it, `None` for no folder."""
    target.parent.mkdir()
    if files is not None:
        target.mkdir()
        for name, text in files.items():
            (target / name).write_text(text)


def in_fork(action: Callable[[], None]) -> int | None:
    """Runs `action` in a copy of this process.

    Returns:
        the exit code, `None` if it was killed.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a process that is killed just before the given operation on the file system.

    Returns:
        False if there are fewer operations.
    """

    def run() -> None:
        left = number

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event not in OPERATIONS:
                return
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()

    code = in_fork(run)
    assert code in (None, 0)
    return code is None


@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "overwritten"])
def test_killed_at_any_operation_it_is_absent_or_complete(before, tmp_path, capfd):
    target = tmp_path / "hf"
    seen, notes = [], ""
    for number in range(1000):
        case = tmp_path / str(number)
        target = case / "hf"
        write_old(target, before)
        was_killed = killed_at(number, lambda target=target: write_new(target))
        found = contents(target)
        assert found in (None, before, NEW)
        seen.append(found)
        if not was_killed:
            assert found == NEW
            break
        # The next run is killed too; the one after it is not.
        killed_at(number // 2, lambda target=target: write_new(target))
        assert contents(target) in (None, before, NEW)
        write_new(target)
        assert contents(target) == NEW
        assert [path for path in case.iterdir() if path != target] == []
        notes += capfd.readouterr().err
    assert number > 10 and seen.count(NEW) > 1  # killed before and after the rename
    assert f"note: removed {tmp_path}" in notes
    if before:
        assert None in seen and "was put back after a killed conversion" in notes


def gone_process() -> int:
    """Returns the number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_a_folder_being_replaced_is_put_back(tmp_path, capfd):
    old = tmp_path / f".hf.old-{output_folder._host()}-{gone_process()}-abcd1234"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(ZeroDivisionError):
        with complete_folder(tmp_path / "hf", overwrite=True, check=has("config.json")):
            raise ZeroDivisionError
    assert contents(tmp_path / "hf") == {"config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert capfd.readouterr().err == (
        f"note: {tmp_path / 'hf'} was put back after a killed conversion\n"
    )


@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "overwritten"])
def test_the_next_conversion_to_another_name_tidies_too(before, tmp_path, capfd):
    """It removes every leftover, an empty folder too, whatever the operation killed at."""
    for number in range(1000):
        case = tmp_path / str(number)
        first = case / "hf0"
        write_old(first, before)
        was_killed = killed_at(number, lambda first=first: write_new(first))
        write_new(case / "hf1")
        assert contents(case / "hf1") == NEW
        assert contents(first) in (before, NEW)
        assert {path.name for path in case.iterdir()} <= {"hf0", "hf1"}
        if not was_killed:
            break
    assert f"note: removed {tmp_path}" in capfd.readouterr().err


def test_only_what_is_known_to_be_dead_is_removed(tmp_path, capfd, monkeypatch):
    """Leftovers stay if they are from another host, from a running process that has no lock yet, or
    from another program."""
    gone = gone_process()
    here = output_folder._host()
    left = [
        f".hf.partial-elsewhere-{gone}-abcd1234",
        f".hf0.partial-elsewhere-{gone}-abcd1234",
        f".hf0.partial-{here}-{os.getpid()}-abcd1234",
        ".hf0.partial-abcd1234",
        ".hf0.partial",
    ]
    dead = [f".hf.partial-{here}-{gone}-abcd1234", f".hf0.old-{here}-{gone}-abcd1234"]
    for name in [*left, *dead]:
        (tmp_path / name).mkdir()
    for name in (left[0], left[1], left[3], left[4], dead[1]):
        (tmp_path / name / "file").write_text(name)
    write_new(tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {*left, "hf", "hf0"}
    assert contents(tmp_path / "hf0") == {"file": dead[1]}
    told = capfd.readouterr().err.splitlines()
    assert told == [
        f"note: {tmp_path / left[0]} belongs to another conversion on elsewhere",
        f"note: removed {tmp_path / dead[0]}, left by a killed conversion",
        f"note: {tmp_path / 'hf0'} was put back after a killed conversion",
    ]

    # Without locks in the file system, only the process id tells.
    monkeypatch.setattr(output_folder.fcntl, "flock", Mock(side_effect=OSError(37, "no locks")))
    for name in (left[2], f".hf0.partial-{here}-{gone}-abcd1234"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "file").write_text("half")
    write_new(tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {*left, "hf", "hf0"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_folder_can_be_the_target(tmp_path, monkeypatch, overwrite):
    """Relative paths lead into the new folder."""
    target = tmp_path / "new"
    target.mkdir()
    if overwrite:
        (target / "mark").touch()
    monkeypatch.chdir(target)
    with complete_folder(Path(), overwrite, check=has("mark")) as folder:
        (folder / "mark").write_text("new")
    assert Path("mark").read_text() == "new" and Path.cwd() == target


def test_what_a_running_conversion_writes_is_left_alone(tmp_path, capfd):
    with pytest.raises(ConvertError, match="hf exists already"):
        with complete_folder(tmp_path / "hf", overwrite=False, check=has("config.json")) as folder:
            (folder / "config.json").write_text("first")
            with complete_folder(
                tmp_path / "hf", overwrite=False, check=has("config.json")
            ) as other:
                (other / "config.json").write_text("second")
            assert f"{folder} belongs to another conversion" in capfd.readouterr().err
            assert contents(folder) == {"config.json": "first"}
    assert contents(tmp_path / "hf") == {"config.json": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_conversion_killed_at_random_operations(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 2, 1, vocab_file)
    target = tmp_path / "out/hf"

    def convert() -> None:
        neox_to_hf(tmp_path / "neox", target, max_shard_bytes=10_000)

    convert()
    whole = {path.name: path.read_bytes() for path in target.iterdir()}
    moments = random.Random(0)
    number, partial = 0, 0
    shutil.rmtree(target)
    while killed_at(number, convert):
        if target.exists():  # killed after it was complete
            assert {path.name: path.read_bytes() for path in target.iterdir()} == whole
            shutil.rmtree(target)
        partial += any(path.suffix == ".safetensors" for path in target.parent.glob(".hf.*/*"))
        number += moments.randrange(1, 20)
    assert partial > 2  # killed while it wrote tensors
    assert {path.name: path.read_bytes() for path in target.iterdir()} == whole
    assert list(target.parent.iterdir()) == [target]
