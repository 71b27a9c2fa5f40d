"""Reading PyTorch files without running what is in them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from convert.command import ConvertError
from convert.inputs import check_regular, refusing
from megatron_patch.torch_crc import noted_records
from megatron_patch.torch_file import UnreadableFile, load_safely

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def saved_name(path: Path, inside: Path | None = None) -> str | None:
    """The name of the file that `torch.save` wrote, which stays inside it when it is renamed;
    `None` where the file has no such note.

    Raises:
        ConvertError: it is no regular file, or does not lie in the folder `inside`.
    """
    check_regular(path, inside)
    try:
        with zipfile.ZipFile(path) as file:
            folder = file.namelist()[0].split("/")[0]
    except (zipfile.BadZipFile, OSError, IndexError, ValueError, NotImplementedError):
        return None
    return None if folder == "archive" else f"{folder}.pt"


def load_torch_file(path: Path, inside: Path | None = None) -> Mapping[str, Any]:
    """The mapping that `torch.save` wrote to `path`; tensors are read from the disk when they are
    used, and may then be compared by `check_bytes`.

    Raises:
        ConvertError: the file is absent, damaged, or holds more than tensors and plain data; it is
            no regular file, or does not lie in the folder `inside`.
    """
    check_regular(path, inside)
    _check_records(path)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: found a {type(content).__name__}, wanted tensors by name")
    return content


def plain_tensors(tensors: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """The same tensors, if each is an ordinary one of floating-point numbers, with data of its size
    in the file: a view may claim more of them than any memory holds.

    Raises:
        ConvertError: names the first that is not.
    """
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
    """Compares the bytes of a tensor with the CRC-32 that `torch.save` noted of them, with those
    that lie in one record with it.

    Args:
        path: the file.
        name: the tensor's, for the error.
        tensor: as `load_torch_file` gave it.

    Raises:
        ConvertError: they are not the ones that were saved.
    """
    with refusing(path):
        status = path.stat()
    noted = _noted(path, status.st_mtime_ns, status.st_size)
    found = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    if noted and found.nbytes and (found.nbytes, zlib.crc32(found.data)) not in noted:
        raise ConvertError(
            f"{path}: damaged: {name} is not what was saved there, by the CRC-32 of its bytes"
        )


@lru_cache(maxsize=256)
def _noted(path: Path, *state_of_the_file: int) -> frozenset[tuple[int, int]]:
    """Sizes and CRC-32 of the records of a file."""
    with refusing(path):
        return frozenset((record.file_size, record.CRC) for record in noted_records(path))


def _check_records(path: Path) -> None:
    """Compares the CRC-32 of all records but tensors, among them the shapes of these. Records that
    are packed are none of PyTorch's, and may unfold to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            for record in file.infolist():
                if record.file_size != record.compress_size:
                    raise ConvertError(f"{path}: no PyTorch file: {record.filename} is packed")
            for record in noted_records(path):
                if "/data/" not in record.filename:
                    file.read(record)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        raise ConvertError(f"{path}: truncated or no PyTorch file: {error}") from None


def _load(path: Path) -> Any:
    try:
        return load_safely(path)
    except UnreadableFile as error:
        raise ConvertError(str(error)) from None
