"""What the scripts share: how their arguments are checked, and how they fail: with one line,
`SCRIPT: argument: found ..., wanted ...`, and exit code 2 for an argument, 1 for all else."""

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
from typing import NoReturn


class CommandError(Exception):
    """Something that the user can mend; the message says what."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message.removeprefix('argument '))}\n")


def run_script(main: Callable[[], object], *errors: type[Exception]) -> None:
    """Runs a script: a `CommandError`, what the system refuses, a package that is missing and
    `errors` end it with one line. A terminated script cleans up as an interrupted one does."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot show is no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (CommandError, OSError, ImportError, *errors) as error:
        sys.exit(f"{name}: {told(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")


def _end(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one does not stop the cleaning up
    sys.exit(128 + number)


def told(error: BaseException) -> str:
    """An error in one line, that of a file with its name first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    return " ".join(text.split())


def refuse(found: object, wanted: str) -> NoReturn:
    """Refuses an argument; `Parser` puts its name before."""
    raise argparse.ArgumentTypeError(f"found {found}, wanted {wanted}")


def whole(smallest: int) -> Callable[[str], int]:
    """Type of an argument: a whole number from `smallest` to what 32 bits hold."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not smallest <= value < 2**31:
            refuse(text, f"a whole number from {smallest} to {2**31 - 1}")
        return value

    return read


def number(fits: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Type of an argument: a finite number that `fits`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            refuse(text, f"a number {wanted}")
        return value

    return read


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Type of an argument: one of these."""
    known = tuple(names)

    def read(text: str) -> str:
        if text not in known:
            refuse(text, f"one of {', '.join(known)}")
        return text

    return read


def existing(text: str) -> Path:
    """Type of an argument: a file or folder that is there, and may be read."""
    path = Path(text)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a part of the path that may not be looked into, or NUL
        there = False
    if not there or not os.access(path, os.R_OK):
        refuse(text, "a file or folder that is there and can be read")
    return path


def existing_file(text: str) -> Path:
    """Type of an argument: a regular file that is there, may be read, and is not empty."""
    path = existing(text)
    if path.is_dir():
        refuse(f"the folder {text}", "a file")
    if not path.is_file():
        refuse(f"the device or pipe {text}", "a file")
    if not path.stat().st_size:
        refuse(f"the empty file {text}", "a file with something in it")
    return path


def existing_folder(text: str) -> Path:
    """Type of an argument: a folder that is there and may be written to."""
    path = existing(text)
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        refuse(text, "a folder that can be written to")
    return path


def output_path(text: str) -> Path:
    """Type of an argument: where a file can be written, its folder being there or not yet."""
    path = Path(text)
    if path.is_dir() or text.endswith(os.sep):
        refuse(f"the folder {text}", "the name of a file to write")
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        refuse(text, f"a file in a folder that can be written to, which {above} is not")
    return path


def output_prefix(text: str) -> Path:
    """Type of an argument: what the names of files to write begin with; a folder may have it."""
    if text.endswith(os.sep):
        refuse(f"the folder {text}", "what the names of files begin with")
    output_path(f"{text}.bin")
    return Path(text)


def output_folder(text: str) -> Path:
    """Type of an argument: a folder that can be written to, being there or not yet."""
    path = Path(text)
    return existing_folder(text) if path.exists() else output_path(text.rstrip(os.sep))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` if all goes well, and goes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def picture(text: str) -> Path:
    """Type of an argument: where matplotlib, which has to be installed, can write a picture."""
    path = output_path(text)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except Exception as error:  # not there, or broken
        refuse(text, f"matplotlib to draw it with ({told(error)})")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        refuse(text, f"a file whose name ends in one of .{', .'.join(known)}")
    return path


def device(text: str) -> str:
    """Type of an argument: a device on which PyTorch computes here."""
    import torch

    try:
        torch.ones(1, device=text).item()
    except Exception as error:  # PyTorch's own kinds are many
        refuse(text, f"a device that PyTorch can use here ({told(error)[:120]})")
    return text


def need_gpu() -> None:
    """Raises unless there is one to check and time kernels on."""
    import torch

    if not torch.cuda.is_available():
        raise CommandError("found no CUDA device, wanted one to check and time on")
