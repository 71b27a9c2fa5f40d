"""Writing safetensors files tensor by tensor, so that no more than one is in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

# The disk is kept writing while the next tensors are read: the system alone would wait until much
# of the memory is taken by unwritten data.
FLUSH_BYTES = 64 * 2**20
HASHED_BYTES = 2**20


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Size of a tensor's data."""
    return math.prod(shape) * dtype.itemsize


class SafetensorsWriter:
    """A safetensors file (https://huggingface.co/docs/safetensors: length of the header as 8 bytes
    little-endian, JSON header, data) whose tensors are announced first and then written in that
    order.

    Args:
        path: the file to create.
        tensors: dtype and shape of each tensor, in the order in which they will be written.

    Attributes:
        checksum: SHA-256 of the whole file, once it is closed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + nbytes(dtype, shape)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        self._announced = dict(tensors)
        self._waiting = list(reversed(tensors))
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._written, self._sum, self._hashed = 0, hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future | None = None
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future | None = None
        self._unflushed = 0
        self._append(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the next tensor.

        Raises:
            ValueError: it is not the one that was announced.
        """
        announced = self._announced[name]
        if self._waiting.pop() != name or (tensor.dtype, tuple(tensor.shape)) != announced:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not announced")
        self._append(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _append(self, data: memoryview) -> None:
        """Raises an OSError, naming the file, if the disk is full or an earlier flush failed."""
        while data.nbytes:
            try:
                written = self._file.write(data)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._path.name) from None
            self._unflushed += written
            self._written += written
            data = data[written:]
        # Beside the reading of the next tensor, from the system's cache: this one's memory is used
        # again by then.
        self._hashing = self._hasher.submit(self._hash_to, self._written)
        if self._unflushed >= FLUSH_BYTES and (not self._flushing or self._flushing.done()):
            if self._flushing:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())
            self._unflushed = 0

    def _hash_to(self, end: int) -> None:
        with self._path.open("rb") as file:
            file.seek(self._hashed)
            while self._hashed < end:
                piece = file.read(min(HASHED_BYTES, end - self._hashed))
                if not piece:
                    raise OSError(errno.EIO, "became shorter while it was written", self._path.name)
                self._sum.update(piece)
                self._hashed += len(piece)

    def close(self) -> None:
        """Ends the file, which is then on the disk.

        Raises:
            ValueError: an announced tensor was not written.
            OSError: it could not be written to the disk.
        """
        try:
            if self._waiting:
                raise ValueError(f"{self._waiting[-1]} was announced and not written")
            if self._flushing:
                self._flushing.result()
            self._hashing.result()
            os.fsync(self._file.fileno())
            self.checksum = self._sum.hexdigest()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the unfinished file."""
        self._hasher.shutdown()
        self._flusher.shutdown()
        self._file.close()
