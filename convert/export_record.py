"""The record of an export: SHA256SUMS, a checksum of each file in the format of `sha256sum`.

Both of these tell whether a folder has changed since it was written:

    sha256sum --check SHA256SUMS  (inside the folder)
    python -m convert.export_record FOLDER

`--overwrite` replaces a folder only if all its files are in the record.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.command import ConvertError, one_line_errors
from convert.files import check_regular, load_torch_file, read_json, read_text, refusing
from convert.tokenizer import TOKENIZER_FILES
from megatron_patch.commands.command_line import run_script

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
    _check_export(folder, "config.json", _is_earlier_model)


def check_checkpoint_export(folder: Path) -> None:
    """Checks the same for a GPT-NeoX checkpoint of this converter; a training's is refused."""
    _check_export(folder, "latest", _is_earlier_checkpoint)


def _check_export(folder: Path, mark: str, is_earlier: Callable[[Path], bool]) -> None:
    record = read_record(folder)
    if mark not in record:
        if record or not folder.is_dir() or not is_earlier(folder):
            raise ConvertError(
                f"{folder} exists, and is nothing that this command wrote: not overwritten"
            )
        return
    for name in sorted(_files(folder)):
        if name not in record and name != RECORD:
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


# ---- Exports of earlier versions, which wrote no record

MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
CARD = "[GPT-NeoX](https://github.com/EleutherAI/gpt-neox)."
STEP_FILE = re.compile(r"(layer_\d+-model|mp_rank)_\d+(-|_)model_states\.pt|configs/[^/]+")
STATES = {
    *("buffer_names", "optimizer", "lr_scheduler", "skipped_steps", "global_steps"),
    *("dp_world_size", "mp_world_size", "iteration", "args", "module"),
}


def _is_earlier_model(folder: Path) -> bool:
    """Recognises an earlier export by its model card and the names of its files."""
    from megatron_patch.hf import remote_code

    known = {"config.json", "generation_config.json", "README.md", *TOKENIZER_FILES}
    known |= {*remote_code.COPIED_FILES, remote_code.OPERATORS_FILE, remote_code.ARCHITECTURE_FILE}
    if not all(name in known or MODEL_FILE.fullmatch(name) for name in _files(folder)):
        return False
    try:
        is_ours = CARD in read_text(folder / "README.md", folder)
        return is_ours and read_json(folder / "config.json", folder).get("model_type") == "metala"
    except ConvertError:
        return False


def _is_earlier_checkpoint(folder: Path) -> bool:
    """Recognises an earlier export by the states in its files; a training saves more, among them
    an optimizer's."""
    try:
        step = read_text(folder / "latest", folder).strip()
        names = _files(folder) - {"latest", "tokenizer.json"}
        of_step = {name.removeprefix(f"{step}/") for name in names if name.startswith(f"{step}/")}
        others = {name for name in names if not name.startswith((f"{step}/", "configs/"))}
        if others or not all(map(STEP_FILE.fullmatch, of_step)):
            return False
        states = load_torch_file(folder / step / "mp_rank_00_model_states.pt", folder)
        return set(states) == STATES and states["optimizer"] is None
    except ConvertError:
        return False


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    folders = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    if not folders or not all(map(Path.is_dir, folders)):
        sys.exit("usage: python -m convert.export_record FOLDER...")
    for folder in folders:
        if not (compared := check_record(folder)):
            raise ConvertError(f"{folder}: holds no {RECORD} of an export")
        print(f"{folder}: {compared} files as they were exported")


if __name__ == "__main__":
    run_script(main)
