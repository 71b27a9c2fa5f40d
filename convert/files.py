"""Reading the files of checkpoints, models and tokenizers, none of which is trusted.

Every reader refuses FIFOs, devices and links that lead out of the folder, runs no code that a file
holds, and raises a `ConvertError` that names the file.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from convert.command import ConvertError
from megatron_patch import files
from megatron_patch.torch_file import UnreadableFile, load_safely, records_with_crc

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns an OSError into a ConvertError that names the error's own file, or else `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConvertError(f"{error.filename or path}: the file is missing") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConvertError(f"{error.filename or path}: cannot be read: {reason}") from None


def check_regular(path: Path, inside: Path | None = None) -> Path:
    """Returns `path` if it is a regular file that, with links resolved, lies in the folder
    `inside`. Raises a ConvertError otherwise."""
    with refusing(path):
        files.check_regular(path, inside)
    return path


def read_text(path: Path, inside: Path | None = None) -> str:
    """Returns the UTF-8 text of a file that passes `check_regular`."""
    with refusing(path):
        return files.read_text(path, inside)


def read_json(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """Returns the JSON object in a file that passes `check_regular`."""
    try:
        values = json.loads(read_text(path, inside))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: wanted a JSON object")
    return values


def write_json(path: Path, value: object) -> None:
    """Writes JSON with the indentation of transformers."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_torch_file(path: Path, inside: Path | None = None) -> Mapping[str, Any]:
    """Returns the mapping that `torch.save` wrote to `path`.

    Tensors are memory-mapped and not yet compared with their CRC-32; see `check_bytes`. Raises a
    ConvertError if the file fails `check_regular`, is damaged, or holds more than tensors and plain
    data.
    """
    check_regular(path, inside)
    _check_records(path)
    try:
        content = load_safely(path)
    except UnreadableFile as error:
        raise ConvertError(str(error)) from None
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: found a {type(content).__name__}, wanted tensors by name")
    return content


def plain_tensors(tensors: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors, detached, after checking that each is dense and floating-point and that
    the file holds all its bytes (a strided view may claim more than any memory holds). Raises a
    ConvertError that names the first tensor that is not."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            raise ConvertError(f"{path}: {name} is a {type(tensor).__name__}, no tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ConvertError(f"{path}: {name} is a tensor without data of its own")
        if tensor.dtype not in DTYPES:
            wanted = ", ".join(str(dtype)[6:] for dtype in DTYPES)
            raise ConvertError(f"{path}: {name} is {tensor.dtype}, wanted {wanted}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ConvertError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, of which the file holds "
                f"{tensor.untyped_storage().nbytes():,} bytes alone"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def check_bytes(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Compares the record that a tensor of `load_torch_file` lies in with the CRC-32 that
    `torch.save` stored. Raises a ConvertError, which tells its name, if they differ."""
    with refusing(path):
        status = path.stat()
    stored = _stored_crcs(path, status.st_mtime_ns, status.st_size)
    found = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    if stored and found.nbytes and (found.nbytes, zlib.crc32(found.data)) not in stored:
        raise ConvertError(
            f"{path}: damaged: {name} is not what was saved there, by the CRC-32 of its bytes"
        )


@lru_cache(maxsize=256)
def _stored_crcs(path: Path, *state_of_the_file: int) -> frozenset[tuple[int, int]]:
    """Returns (size, CRC-32) of a file's records; size and mtime of the file key the cache."""
    with refusing(path):
        return frozenset((record.file_size, record.CRC) for record in records_with_crc(path))


def _check_records(path: Path) -> None:
    """Compares all records but tensor data with their CRC-32, the pickle with the shapes first.
    Refuses compressed records: PyTorch writes none, and they may unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            for record in file.infolist():
                if record.file_size != record.compress_size:
                    raise ConvertError(f"{path}: no PyTorch file: {record.filename} is packed")
            for record in records_with_crc(path):
                if "/data/" not in record.filename:
                    file.read(record)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        raise ConvertError(f"{path}: truncated or no PyTorch file: {error}") from None


def saved_name(path: Path, inside: Path | None = None) -> str | None:
    """Returns the file name that `torch.save` was given, which a later renaming does not change;
    `None` if the file does not store one. Raises a ConvertError if the file fails
    `check_regular`."""
    check_regular(path, inside)
    try:
        with zipfile.ZipFile(path) as file:
            folder = file.namelist()[0].split("/")[0]
    except (zipfile.BadZipFile, OSError, IndexError, ValueError, NotImplementedError):
        return None
    return None if folder == "archive" else f"{folder}.pt"
