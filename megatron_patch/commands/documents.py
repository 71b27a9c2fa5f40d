"""Reads texts to tokenize from files and folders. An error names the file, and the line."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst", *LINES_SUFFIXES)
# What compressed files begin with, and what their names end in.
_COMPRESSED = {
    "bzip2": (b"BZh", ".bz2"),
    "gzip": (b"\x1f\x8b", ".gz"),
    "xz": (b"\xfd7zXZ", ".xz"),
    "zip": (b"PK\x03\x04", ".zip"),
    "zstd": (b"\x28\xb5\x2f\xfd", ".zst"),
}
MAX_BYTES = 2**30  # largest document; reading and tokenizing takes ten times its size in memory


class Document(NamedTuple):
    """A text with the file, and the line, that it came from."""

    text: str
    origin: str


def list_files(inputs: Iterable[Path], suffixes: Iterable[str] | None = None) -> list[Path]:
    """Returns the files to read: inputs in the order given, files inside a folder by name, if they
    end in one of `suffixes`, by default `TEXT_SUFFIXES`, in capitals or not. Links to folders and
    compressed files are left out, each with a line on standard error. Raises an OSError if a folder
    cannot be read, and a ValueError if something to read is not a regular file (a broken link, a
    pipe), or nothing was found."""
    wanted = tuple(suffix.lower() for suffix in suffixes or TEXT_SUFFIXES)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = _files_below(path, wanted)
            files.extend(sorted(found, key=lambda p: p.relative_to(path).as_posix()))
        else:
            files.append(path)
    for path in files:
        if not path.is_file():
            what = "a broken link" if path.is_symlink() and not path.exists() else "no regular file"
            raise ValueError(f"{path}: found {what}, wanted a file with text")
    if not files:
        raise ValueError(f"no files ending in {', '.join(wanted)} found (see --suffix)")
    return files


def _files_below(top: Path, wanted: tuple[str, ...]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    compressed = tuple(end + suffix for end in wanted for _, suffix in _COMPRESSED.values())
    for folder, folders, names in os.walk(top, onerror=fail):
        for name in folders:
            if (link := Path(folder, name)).is_symlink():
                print(f"left out: {link}, a link to a folder; it can be an input", file=sys.stderr)
        for name in sorted(names):
            if name.lower().endswith(compressed):
                print(f"left out: {Path(folder, name)}, which is compressed", file=sys.stderr)
        yield from (Path(folder, name) for name in names if name.lower().endswith(wanted))


def iterate_documents(
    inputs: Iterable[Path],
    json_key: str = "text",
    suffixes: Iterable[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Document]:
    """Yields all documents of the files of `list_files` except empty ones, without byte order
    marks. A line of a file in JSON lines (`LINES_SUFFIXES`) has its text under `json_key`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a document is larger than `max_bytes`, a line of a .jsonl file is not an object
            with a text under `json_key`, a file holds such objects and has another name, or a file
            is compressed or not UTF-8. The message names file and line.
    """
    for path in list_files(inputs, suffixes):
        read = _read_lines if path.suffix.lower() in LINES_SUFFIXES else _read_text
        for document in read(path, json_key, max_bytes):
            if document.text.strip():
                yield document


def _not_text(path: Path, origin: str, error: UnicodeDecodeError) -> ValueError:
    """Returns the error for bytes that are not UTF-8, as those of a compressed file."""
    with open(path, "rb") as file:
        start = file.read(8)
    for kind, (magic, _) in _COMPRESSED.items():
        if start.startswith(magic):
            return ValueError(f"{path}: found a file compressed by {kind}, wanted text: unpack it")
    return ValueError(f"{origin}: not UTF-8 text: {error}")


def _read_text(path: Path, json_key: str, max_bytes: int) -> Iterator[Document]:
    _check_size(path.stat().st_size, str(path), max_bytes)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, str(path), error) from None
    if _holds_records(text, json_key):
        raise ValueError(
            f"{path}: found JSON objects with a text under {json_key!r}, wanted one a line in a "
            "file whose name ends in .jsonl: under this name all of them would be one document"
        )
    yield Document(text, str(path))


def _holds_records(text: str, json_key: str) -> bool:
    """Returns whether a text is a list of JSON objects with a text under `json_key`, or begins with
    two lines of such."""
    begin = re.match(r"\s*(\[\s*)?\{", text)
    if not begin:
        return False
    try:
        if begin[1]:
            found = json.loads(text)
        else:
            lines = (line for line in io.StringIO(text) if line.strip())
            found = [json.loads(line) for line in islice(lines, 2)]
            found = found if len(found) == 2 else []
    except (ValueError, RecursionError):
        return False
    records = [isinstance(x, dict) and isinstance(x.get(json_key), str) for x in found]
    return bool(records) and all(records)


def _read_lines(path: Path, json_key: str, max_bytes: int) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(max_bytes + 1), b""), 1):
            origin = f"{path}:{number}"
            _check_size(len(line), origin, max_bytes)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    decoded = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _not_text(path, origin, error) from None
                yield Document(_text_in(decoded, json_key, origin), origin)


def _text_in(line: str, json_key: str, origin: str) -> str:
    try:
        text = json.loads(line)[json_key]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{origin}: wanted an object with a text under {json_key!r}")
    if lone := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{origin}: found the lone surrogate {lone[0]!a}, wanted text")
    return text


def _check_size(size: int, origin: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(
            f"{origin}: found a document of more than {max_bytes:,} bytes, the most that "
            "--max-document allows"
        )


def with_a_first(documents: Iterable[Document]) -> Iterator[Document]:
    """Reads the first document, and returns an iterator over all of them. Raises a ValueError if
    there is no document."""
    documents = iter(documents)
    for first in documents:
        return chain([first], documents)
    raise ValueError("inputs: found no text, wanted one document or more")
