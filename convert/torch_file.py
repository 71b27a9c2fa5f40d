"""Reading PyTorch files without running what is in them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.command import ConvertError
from megatron_patch.torch_file import UnreadableFile, load_safely


def saved_name(path: Path) -> str | None:
    """The name of the file that `torch.save` wrote, which stays inside it when it is renamed;
    `None` where the file has no such note."""
    try:
        with zipfile.ZipFile(path) as file:
            folder = file.namelist()[0].split("/")[0]
    except (zipfile.BadZipFile, OSError, IndexError):
        return None
    return None if folder == "archive" else f"{folder}.pt"


def load_torch_file(path: Path) -> Mapping[str, Any]:
    """The mapping that `torch.save` wrote to `path`; tensors are read from the disk when they are
    used.

    Raises:
        ConvertError: the file is absent, damaged, or holds more than tensors and plain data.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: found a {type(content).__name__}, wanted tensors by name")
    return content


def _load(path: Path) -> Any:
    try:
        return load_safely(path)
    except UnreadableFile as error:
        raise ConvertError(str(error)) from None
