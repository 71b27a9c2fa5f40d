"""The CRC-32 that `torch.save` notes of each record of its zip file, which `torch.load` does not
compare: damage to a file passes as other weights."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

PIECE_BYTES = 4 * 2**20


def noted_records(path: Path) -> list[zipfile.ZipInfo]:
    """The records of a file whose CRC-32 is noted. There are none in a file of the format before
    PyTorch 1.6, and in one that was written with `torch.serialization.set_crc32_options(False)`.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return []
    return records if any(record.CRC for record in records) else []


def damaged_record(path: Path) -> str | None:
    """The name of the first record that is not what `torch.save` wrote; `None` if all are, or
    nothing is noted of them. Reads the whole file, in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    noted = noted_records(path)
    if not noted:
        return None
    with zipfile.ZipFile(path) as file:
        for record in noted:
            try:
                with file.open(record) as stream:
                    while stream.read(PIECE_BYTES):  # compares at the end
                        pass
            except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error):
                return record.filename
    return None
