"""Argument types and error handling for all commands. A command that fails prints one line,
`COMMAND: argument: found ..., wanted ...`, and exits with 2 for an argument, with 1 otherwise."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_patch import architecture
from megatron_patch.architecture import SettingsError


class CommandError(Exception):
    """An error that the user can mend. The message says what is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message.removeprefix('argument '))}\n")


def run_script(main: Callable[[], object], *errors: type[Exception]) -> None:
    """Runs a command from a terminal and ends it with one line on a `CommandError`, a
    `SettingsError`, an `OSError`, a missing package, or one of `errors`. SIGTERM and SIGHUP let it
    clean up, as Ctrl-C does."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that a terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (CommandError, SettingsError, OSError, ImportError, *errors) as error:
        sys.exit(f"{name}: {told(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")


def _end(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleaning up
    sys.exit(128 + number)


def told(error: BaseException) -> str:
    """Returns an error as one line; that of a file starts with its name."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(str(error)) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: str) -> str:
    """Returns text as one line that a terminal can show."""
    return " ".join(architecture.one_line(text).split())


def refuse(found: object, wanted: str) -> NoReturn:
    """Raises the error for an argument's value; argparse adds the argument's name."""
    raise argparse.ArgumentTypeError(f"found {found}, wanted {wanted}")


def _checked(kind: Callable[[str], Any], fits: Callable[[Any], bool], wanted: str) -> Callable:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        refuse(text, wanted)

    return read


def whole(smallest: int) -> Callable[[str], int]:
    """Returns the argument type of whole numbers from `smallest` to 2**31 - 1."""
    wanted = f"a whole number from {smallest} to {2**31 - 1}"
    return _checked(int, lambda value: smallest <= value < 2**31, wanted)


def number(fits: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Returns the argument type of finite numbers that `fits` accepts."""
    return _checked(float, lambda value: math.isfinite(value) and fits(value), f"a number {wanted}")


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Returns the argument type of a choice between names."""
    known = tuple(names)
    return _checked(str, known.__contains__, f"one of {', '.join(known)}")


def _path(text: str) -> Path:
    """Returns a path. `~` is the home folder, which a shell leaves to us in `--output=~/x`."""
    return Path(os.path.expanduser(text))


def existing(text: str) -> Path:
    """Argument type: a file or folder that exists and can be read."""
    path = _path(text)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a folder without permission, or a NUL in the path
        there = False
    if not there or not os.access(path, os.R_OK):
        refuse(text, "a file or folder that is there and can be read")
    return path


def existing_file(text: str) -> Path:
    """Argument type: a regular file that exists, can be read, and is not empty."""
    path = existing(text)
    if path.is_dir():
        refuse(f"the folder {text}", "a file")
    if not path.is_file():
        refuse(f"the device or pipe {text}", "a file")
    if not path.stat().st_size:
        refuse(f"the empty file {text}", "a file with something in it")
    return path


def existing_folder(text: str) -> Path:
    """Argument type: a folder that exists and can be written to."""
    path = existing(text)
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        refuse(text, "a folder that can be written to")
    return path


def output_path(text: str) -> Path:
    """Argument type: a file that can be written, in a folder that may not exist yet."""
    path = _path(text)
    if path.is_dir() or text.endswith(os.sep):
        refuse(f"the folder {text}", "the name of a file to write")
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        refuse(text, f"a file in a folder that can be written to, which {above} is not")
    return path


def output_prefix(text: str) -> Path:
    """Argument type: the start of the names of files to write. A folder may have that name."""
    if text.endswith(os.sep):
        refuse(f"the folder {text}", "what the names of files begin with")
    output_path(f"{text}.bin")
    return _path(text)


def output_folder(text: str) -> Path:
    """Argument type: a folder that can be written to and may not exist yet."""
    path = _path(text)
    return existing_folder(text) if path.exists() else output_path(text.rstrip(os.sep))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write a file under. It becomes `path` on success and is removed on
    an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def picture(text: str) -> Path:
    """Argument type: a file that matplotlib can write a picture to. Fails without matplotlib."""
    path = output_path(text)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except Exception as error:  # missing, or a broken installation
        refuse(text, f"matplotlib to draw it with ({told(error)})")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        refuse(text, f"a file whose name ends in one of .{', .'.join(known)}")
    return path


def device(text: str) -> str:
    """Argument type: a device on which PyTorch can compute here."""
    import torch

    try:
        torch.ones(1, device=text).item()
    except Exception as error:  # PyTorch raises many types
        refuse(text, f"a device that PyTorch can use here ({told(error)[:120]})")
    return text


def need_gpu() -> None:
    """Raises a CommandError where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise CommandError("found no CUDA device, wanted one to check and time on")
