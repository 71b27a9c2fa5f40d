"""Reading PyTorch files without running code that they hold, and checking their CRC-32."""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PIECE_BYTES = 4 * 2**20


class UnreadableFile(ValueError):
    """An error of one line, which names the file and says why it cannot be read."""


# The objects that DeepSpeed stores with ZeRO's weights are read as empty classes of the same names,
# so that DeepSpeed is not needed and none of its code runs.
_STAND_INS = [
    type(name, (kind,), {"__module__": module})
    for module, name, kind in (
        ("deepspeed.runtime.zero.config", "ZeroStageEnum", int),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler", object),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", object),
        ("deepspeed.utils.tensor_fragment", "fragment_address", object),
    )
]
_ZERO_STAGES = ("disabled", "optimizer_states", "gradients", "weights")


def _zero_stage(kind: type, name: str) -> Any:
    """Stands for `getattr`, by which Python 3.11.0 to 3.11.3 store a member of an enumeration."""
    if kind is not _STAND_INS[0] or name not in _ZERO_STAGES:
        raise pickle.UnpicklingError("GLOBAL getattr")
    return kind(_ZERO_STAGES.index(name))


@contextlib.contextmanager
def readable(others: Iterable[Any] = ()) -> Iterator[None]:
    """Lets `torch.load` read NumPy arrays and numbers in this context, and `others`: classes, or
    functions with the names that files call them by. GPT-NeoX and the Trainer store NumPy's random
    state, and schedules may hold NumPy's numbers."""
    before = torch.serialization.get_safe_globals()
    types = [np.ndarray, np.dtype, *(type(np.dtype(t)) for t in ("u4", "i8", "f4", "f8"))]
    torch.serialization.add_safe_globals(types)
    for value in (np.array([0], dtype=np.uint32), np.float64(0)):
        reconstruct = value.__reduce__()[0]
        torch.serialization.add_safe_globals([reconstruct])
        # NumPy 1 and 2 pickle the function under different module names. torch before 2.6 takes no
        # names.
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
                named = (reconstruct, f"{module}.{reconstruct.__name__}")
                torch.serialization.add_safe_globals([named])
    for other in others:
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            torch.serialization.add_safe_globals([other])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_safely(path: Path) -> Any:
    """Returns what `torch.save` wrote to `path`, with memory-mapped tensors. Raises an
    UnreadableFile if the file is absent, damaged, or holds more than tensors and plain data."""
    for mmap in (True, False):  # a file in the format before PyTorch 1.6 cannot be mapped
        try:
            with readable([*_STAND_INS, (_zero_stage, "builtins.getattr")]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            # "Unsupported operand" is an unknown opcode: torch.save writes no such pickle.
            if found or "Unsupported operand" not in str(error):
                what = found[1] if found else "more than tensors"
                raise UnreadableFile(
                    f"{path}: refused: reading it would run code, it holds {what}"
                ) from None
            raise UnreadableFile(f"{path}: truncated or no PyTorch file") from None
        except FileNotFoundError:
            raise UnreadableFile(f"{path}: the file is missing") from None
        except PermissionError as error:
            raise UnreadableFile(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # damaged files raise errors of many kinds
            if not (mmap and "mmap can only be used" in str(error)):
                raise UnreadableFile(f"{path}: truncated or no PyTorch file") from None
    raise AssertionError("the second pass returns or raises")


def records_with_crc(path: Path) -> list[zipfile.ZipInfo]:
    """Returns the records of a file with the CRC-32 that `torch.save` stored for them. The list is
    empty for a file in the format before PyTorch 1.6, and for one that was written with
    `torch.serialization.set_crc32_options(False)`. Raises an OSError if the file cannot be read."""
    try:
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return []
    return records if any(record.CRC for record in records) else []


def damaged_record(path: Path) -> str | None:
    """Returns the name of the first record whose CRC-32 is wrong, `None` if all are right or none
    is stored. `torch.load` does not compare them, so that damage passes as other weights. Reads the
    whole file, in pieces. Raises an OSError if the file cannot be read."""
    stored = records_with_crc(path)
    if not stored:
        return None
    with zipfile.ZipFile(path) as file:
        for record in stored:
            try:
                with file.open(record) as stream:
                    while stream.read(PIECE_BYTES):  # zipfile compares at the end
                        pass
            except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error):
                return record.filename
    return None
