"""Reading PyTorch files without running what is in them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch


class UnreadableFile(ValueError):
    """One line that names the file, and says why it cannot be read."""


def _allow_numpy_states() -> None:
    """GPT-NeoX stores NumPy's random state, an array of uint32, beside the weights, and schedules
    may hold NumPy's numbers."""
    types = [np.ndarray, np.dtype, *(type(np.dtype(t)) for t in ("u4", "i8", "f4", "f8"))]
    torch.serialization.add_safe_globals(types)
    for value in (np.array([0], dtype=np.uint32), np.float64(0)):
        reconstruct = value.__reduce__()[0]
        torch.serialization.add_safe_globals([reconstruct])
        # NumPy 1 and 2 name the function's module differently, in files too.
        other = {
            "numpy.core.multiarray": "numpy._core.multiarray",
            "numpy._core.multiarray": "numpy.core.multiarray",
        }[reconstruct.__module__]
        try:
            named = (reconstruct, f"{other}.{reconstruct.__name__}")
            torch.serialization.add_safe_globals([named])
        except (TypeError, ValueError, AttributeError):  # before torch 2.6
            pass


def _allow_deepspeed_states() -> None:
    """DeepSpeed stores two objects of its own beside ZeRO's weights. They are read as inert
    stand-ins of the same names: DeepSpeed is not needed, and none of its code runs."""
    for module, name, kind in (
        ("deepspeed.runtime.zero.config", "ZeroStageEnum", int),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler", object),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", object),
    ):
        stand_in = type(name, (kind,), {"__module__": module})
        torch.serialization.add_safe_globals([stand_in])


_allow_numpy_states()
_allow_deepspeed_states()


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote to `path`; tensors are read from the disk when they are used.

    Raises:
        UnreadableFile: the file is absent, damaged, or holds more than tensors and plain data.
    """
    for mmap in (True, False):  # files in the format before PyTorch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            # an unknown opcode: no pickle that torch.save writes
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
        except Exception as error:  # a damaged file fails in many ways
            if not (mmap and "mmap can only be used" in str(error)):
                raise UnreadableFile(f"{path}: truncated or no PyTorch file") from None
    raise AssertionError("the second pass returns or raises")
