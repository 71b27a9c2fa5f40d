"""GPT-NeoX's (and Megatron's) memory-mapped token files: PREFIX.bin and PREFIX.idx.

`.bin` holds the tokens of all documents one after another, without a header. `.idx`, little-endian:

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the token type, see `_DTYPES`
    uint64    n, number of documents (GPT-NeoX: sequences; it splits and shuffles by these)
    uint64    m, length of the document index
    int32[n]  number of tokens of each
    int64[n]  offset of each in the `.bin` file, in bytes
    int64[m]  document index: where each document starts, counted in sequences, and the end;
              written here as 0, 1, ..., n, since a document is one sequence
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_NAMES = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64", "uint16")
_DTYPES = {code: np.dtype(name).newbyteorder("<") for code, name in enumerate(_NAMES, 1)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# From this size on GPT-NeoX and Megatron use four bytes per token instead of two.
_FIRST_LARGE_VOCABULARY = 65500


class IndexedDatasetError(ValueError):
    """An error in a `.bin` / `.idx` pair, or in a document to be written to one."""


def bin_path(prefix: str | Path) -> Path:
    """Returns the token file of a data set; `prefix` is GPT-NeoX's `data_path`, without an
    ending."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Returns the index file of a data set."""
    return Path(f"{prefix}.idx")


def index_map_paths(prefix: str | Path) -> list[Path]:
    """Returns GPT-NeoX's index maps of a data set, which say which documents make which sample.
    GPT-NeoX keeps them next to the pair, and they are wrong once the pair is replaced."""
    folder, start = Path(prefix).parent, re.escape(Path(prefix).name)
    name = re.compile(  # the hash is that of `megatron_patch.neox.upstream_fixes.data`
        rf"{start}(_[0-9a-f]{{16}})?_(train|valid|test)(_\d+)?"
        r"_indexmap_.+_(doc|sample|shuffle)_idx\.npy"
    )
    return sorted(path for path in folder.glob("*_idx.npy") if name.fullmatch(path.name))


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the token type that GPT-NeoX chooses for a vocabulary: uint16 if it fits, else
    int32."""
    return np.dtype("<u2" if vocab_size < _FIRST_LARGE_VOCABULARY else "<i4")


class IndexedDataset:
    """The documents of a `.bin` / `.idx` pair, memory-mapped. `prefix` is the pair's path without
    the ending. Raises a FileNotFoundError if one of the two files is not there, and an
    IndexedDatasetError if the pair is damaged, or shorter than its header or index says."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: no such file, wanted {prefix}.idx and {prefix}.bin"
                )
        self._read_index(idx_path(prefix))
        tokens = bin_path(prefix)
        lengths = self.sizes * np.int64(self.dtype.itemsize)
        # If the sum overflows, the offset alone is already larger than the file.
        ends = np.maximum(self._offsets, self._offsets + lengths)
        wanted = int(ends.max(initial=0))
        if (found := tokens.stat().st_size) < wanted:
            raise IndexedDatasetError(f"{tokens}: truncated: found {found} bytes, wanted {wanted}")
        # memmap does not take an empty file.
        self._bin = np.memmap(tokens, mode="r") if wanted else np.empty(0, np.uint8)

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise IndexedDatasetError(
                f"{path}: found {header[:9]!r} at its start, wanted {_MAGIC!r}"
            )
        if size < _HEADER.size:
            raise IndexedDatasetError(f"{path}: truncated: found {size} bytes, a header has 34")
        _, version, code, count, index_length = _HEADER.unpack(header)
        if version != _VERSION:
            raise IndexedDatasetError(f"{path}: found version {version}, wanted {_VERSION}")
        if code not in _DTYPES:
            raise IndexedDatasetError(f"{path}: unknown token type {code}, known are 1 to 8")
        wanted = _HEADER.size + count * (4 + 8) + index_length * 8
        if size < wanted:
            raise IndexedDatasetError(f"{path}: truncated: found {size} bytes, wanted {wanted}")
        index = np.memmap(path, mode="r")
        sizes_end = _HEADER.size + 4 * count
        offsets_end = sizes_end + 8 * count
        self.dtype = _DTYPES[code]
        self.sizes = index[_HEADER.size : sizes_end].view("<i4")  # int32 [n], tokens per document
        self._offsets = index[sizes_end:offsets_end].view("<i8")
        self.document_index = index[offsets_end:wanted].view("<i8")  # int64 [m]
        if count and (self.sizes.min() < 0 or self._offsets.min() < 0):
            raise IndexedDatasetError(f"{path}: damaged: negative sizes or offsets")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns all tokens of one document, read-only, in the file's token type."""
        return self.get(index)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.get(index) for index in range(len(self)))

    def get(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns tokens `start` to `stop` (by default the end) of one document."""
        size = int(self.sizes[index])
        start, stop, _ = slice(start, stop).indices(size)
        first = int(self._offsets[index]) + start * self.dtype.itemsize
        last = first + max(stop - start, 0) * self.dtype.itemsize
        return self._bin[first:last].view(self.dtype)


def _open_alone(path: Path) -> BinaryIO:
    """Opens and empties a file, unless another process is writing it."""
    file = open(path, "ab")  # does not empty it yet: it may belong to another process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise BlockingIOError  # another process has just finished, and renamed it
    except BlockingIOError:
        file.close()
        raise IndexedDatasetError(f"{path}: another process is writing this data set") from None
    except OSError as error:
        # On a file system without locks the file is written without one.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    file.truncate(0)
    return file


class IndexedDatasetWriter:
    """Writes a `.bin` / `.idx` pair, one document at a time, with the paths `paths`.

    The files have temporary names until `close`, and an exception inside `with` removes them, so
    that a pair under its own name is always complete. Files that a killed process left are
    overwritten. Raises an IndexedDatasetError if another process is writing this pair.

    Args:
        prefix: path of the pair without the ending; its folder is made, an existing pair replaced.
        vocab_size: limit of the token ids, which also decides on two or four bytes per token.
        lowest: the smallest number. Labels of documents have -100 where a token does not count;
            below 0 a number takes four bytes.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, lowest: int = 0):
        self.vocab_size, self.lowest = vocab_size, lowest
        self.dtype = token_dtype(vocab_size) if lowest >= 0 else np.dtype("<i4")
        self.paths = [bin_path(prefix), idx_path(prefix)]
        self._temporary = [p.with_name(f"{p.name}.tmp") for p in self.paths]
        self._sizes: list[int] = []
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(self._temporary[0])

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Appends one document. Raises an IndexedDatasetError if a token is below `lowest` or not
        below `vocab_size`, or the document has 2^31 tokens or more."""
        tokens = np.asarray(tokens).reshape(-1)
        if tokens.size >= 2**31:
            raise IndexedDatasetError(
                f"document {len(self._sizes)}: found {tokens.size:,} tokens, wanted less than 2^31"
            )
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < self.lowest or high >= self.vocab_size:
                raise IndexedDatasetError(
                    f"document {len(self._sizes)}: found tokens from {low} to {high}, wanted "
                    f"{self.lowest} to {self.vocab_size - 1}"
                )
        self._file.write(tokens.astype(self.dtype).tobytes())
        self._sizes.append(tokens.size)

    def close(self) -> None:
        """Completes the pair and renames it to its own name. Raises an IndexedDatasetError if no
        token was written, and GPT-NeoX could not map an empty file."""
        try:
            self._file.flush()
            if not sum(self._sizes):
                raise IndexedDatasetError(f"{self.paths[0]}: no tokens to write")
            self._write_index(self._temporary[1])
            # The index is removed first and renamed last: without one there is no data set.
            self.paths[1].unlink(missing_ok=True)
            for temporary, path in zip(self._temporary, self.paths, strict=True):
                temporary.replace(path)
            self._file.close()  # releases the lock
        except BaseException:
            self.discard()
            raise

    def _write_index(self, path: Path) -> None:
        sizes = np.asarray(self._sizes, "<i4")
        ends = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        count = len(sizes)
        with open(path, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self.dtype], count, count + 1))
            file.write(sizes.tobytes())
            file.write((ends - sizes * np.int64(self.dtype.itemsize)).astype("<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())

    def discard(self) -> None:
        """Removes the unfinished files."""
        for path in self._temporary:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk does not take the buffered rest
            self._file.close()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
