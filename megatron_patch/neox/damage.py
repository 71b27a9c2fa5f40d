"""Damaged checkpoint files must not be trained on: `torch.load` takes a flipped bit for another
weight, although the file's own CRC-32 tells."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_patch.torch_file import damaged_record


@contextmanager
def comparing_files() -> Iterator[None]:
    """While it is entered, each file that this rank loads through DeepSpeed is compared with its
    CRC-32 first; a damaged one ends the rank with a line.

    The file is read once more, at 1 to 3 GB/s a rank, and comes from the system's cache when it is
    loaded.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    load = TorchCheckpointEngine.load

    def load_undamaged(self, path, *args, **kwargs):
        if Path(path).is_file() and (record := damaged_record(Path(path))):
            sys.exit(
                f"MetaLA: load: found {path} damaged, its {record} is not what was saved (CRC-32), "
                "wanted the file as it was written, or another checkpoint, by iteration"
            )
        return load(self, path, *args, **kwargs)

    TorchCheckpointEngine.load = load_undamaged
    try:
        yield
    finally:
        TorchCheckpointEngine.load = load
