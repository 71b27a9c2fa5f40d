"""Reading files of a checkpoint, a model or a tokenizer; what cannot be read is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.command import ConvertError
from megatron_patch import files


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns what the system says of a file into a ConvertError, which names `path` where the system
    does not name another."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConvertError(f"{error.filename or path}: the file is missing") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConvertError(f"{error.filename or path}: cannot be read: {reason}") from None


def check_regular(path: Path, inside: Path | None = None) -> Path:
    """`path`, if it is a regular file, and really lies in the folder `inside` if one is given.

    Raises:
        ConvertError: it is not.
    """
    with refusing(path):
        files.check_regular(path, inside)
    return path


def read_text(path: Path, inside: Path | None = None) -> str:
    """The text of such a file, in UTF-8."""
    with refusing(path):
        return files.read_text(path, inside)


def read_json(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """The JSON object of such a file."""
    try:
        values = json.loads(read_text(path, inside))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: wanted a JSON object")
    return values
