"""The record of an export: SHA256SUMS, a checksum of each file in the format of `sha256sum`.

Both of these tell whether a folder has changed since it was written:

    sha256sum --check SHA256SUMS  (inside the folder)
    python -m convert.export_record FOLDER

`--overwrite` replaces a folder only if all its files are in the record.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.command import ConvertError
from convert.files import check_regular, read_text, refusing
from megatron_patch.commands.command_line import Parser, existing, run_script

RECORD = "SHA256SUMS"
HEAD = "# Written by metala-neox. Whether a file has changed: sha256sum --check SHA256SUMS\n"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
PIECE_BYTES = 4 * 2**20


def write_record(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the checksums of all files in a folder, reading those that are not `known`."""
    known = known or {}
    names = sorted(_files(folder))
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda name: known.get(name) or _checksum(folder / name), names)
        lines = [f"{found}  {name}\n" for found, name in zip(sums, names, strict=True)]
    (folder / RECORD).write_text(HEAD + "".join(lines), encoding="utf-8")


def read_record(folder: Path) -> dict[str, str]:
    """Returns checksums by file name, an empty dict if the folder has no record of ours."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    text = read_text(path, folder)
    if not text.startswith(HEAD):
        return {}
    found = [LINE.fullmatch(line) for line in text.removeprefix(HEAD).splitlines()]
    if not all(found):
        raise ConvertError(f"{path}: line {found.index(None) + 2} is none of a checksum")
    return {line[2]: line[1] for line in found}


def check_record(folder: Path, names: Iterable[str] | None = None) -> int:
    """Compares files of a folder, by default all, with its record if it has one. Returns the number
    compared. Raises a ConvertError if a file is missing or has changed."""
    record = read_record(folder)
    chosen = [name for name in (record if names is None else names) if name in record]
    for name in chosen:
        check_regular(folder / name, folder)
        if _checksum(folder / name) != record[name]:
            raise ConvertError(
                f"{folder / name}: damaged, or changed since it was exported, by {RECORD}; remove "
                f"{RECORD} if the change is meant"
            )
    return len(chosen)


def check_model_export(folder: Path) -> None:
    """Checks that a folder holds an exported Hugging Face model and nothing else, so that it may be
    removed. Raises a ConvertError if it holds something else."""
    _check_export(folder, "config.json")


def check_checkpoint_export(folder: Path) -> None:
    """Checks the same for a GPT-NeoX checkpoint of this converter; a training's is refused."""
    _check_export(folder, "latest")


def _check_export(folder: Path, mark: str) -> None:
    record = read_record(folder)
    if mark not in record:
        raise ConvertError(
            f"{folder} exists, and is nothing that this command wrote: not overwritten"
        )
    for name in sorted(_files(folder) - record.keys() - {RECORD}):
        raise ConvertError(
            f"{folder / name} is no file of the export that is there, and would go with it: "
            "not overwritten"
        )


def _files(folder: Path) -> set[str]:
    """Returns the relative paths of all files and links below a folder."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _checksum(path: Path) -> str:
    found = hashlib.sha256()
    with refusing(path), path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            found.update(piece)
    return found.hexdigest()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Tells whether the files of exports are as they were written.")
    parser.add_argument("folders", type=existing, nargs="+", help="of exports")
    for folder in parser.parse_args(argv).folders:
        if not (compared := check_record(folder)):
            raise ConvertError(f"{folder}: holds no {RECORD} of an export")
        print(f"{folder}: {compared} files as they were exported")


if __name__ == "__main__":
    run_script(main)
