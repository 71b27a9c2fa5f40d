"""Damaging files, for tests."""

from __future__ import annotations

import zipfile
from pathlib import Path


def flip_bit(path: Path, record: str | None = None) -> str:
    """Flips one bit in the middle of a record, by default the largest, of a file of `torch.save`.

    Returns:
        the record's name.
    """
    with zipfile.ZipFile(path) as file:
        chosen = (
            next(r for r in file.infolist() if r.filename.endswith(record))
            if record
            else max(file.infolist(), key=lambda r: r.file_size)
        )
    with path.open("r+b") as file:
        file.seek(chosen.header_offset + 26)
        lengths = file.read(4)
        start = chosen.header_offset + 30
        start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        file.seek(start + chosen.file_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return chosen.filename
