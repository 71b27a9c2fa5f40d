"""Reads texts to tokenize from files and folders. An error names the file, and the line."""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
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
    end in one of `suffixes`, by default `TEXT_SUFFIXES`. Links to folders and compressed files are
    left out, each with a line on standard error. Raises an OSError if a folder cannot be read, and
    a ValueError if something to read is not a regular file (a broken link, a pipe), or nothing was
    found."""
    wanted = tuple(suffixes or TEXT_SUFFIXES)
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
            if name.endswith(compressed):
                print(f"left out: {Path(folder, name)}, which is compressed", file=sys.stderr)
        yield from (Path(folder, name) for name in names if name.endswith(wanted))


def iterate_documents(
    inputs: Iterable[Path],
    json_key: str = "text",
    suffixes: Iterable[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Document]:
    """Yields all documents of the files of `list_files` except empty ones, without byte order
    marks. A line of a .jsonl file has its text under `json_key`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a document is larger than `max_bytes`, a line of a .jsonl file is not an object
            with a text under `json_key`, or a file is compressed or not UTF-8. The message names
            file and line.
    """
    for path in list_files(inputs, suffixes):
        read = _read_lines if path.suffix == ".jsonl" else _read_text
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


def _read_text(path: Path, _: str, max_bytes: int) -> Iterator[Document]:
    _check_size(path.stat().st_size, str(path), max_bytes)
    try:
        yield Document(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise _not_text(path, str(path), error) from None


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
