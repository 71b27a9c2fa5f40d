"""Files that keep a run which time may cut off."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch

from megatron_patch.commands.command_line import replacing

MOST = 15_000_000  # bytes of a file: small enough to travel with the results


class Kept:
    """The newest state of a run, in files PATH-STEP-1of2.pt and so on.

    A state is a dictionary that `torch.save` can write. One whose files were not all written is not
    read: the state before it is removed only after the last of them.
    """

    def __init__(self, path: Path):
        self.path = path

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a state, in the place of the one before."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        parts = [data[start : start + MOST] for start in range(0, len(data), MOST)]
        new = [
            self.path.with_name(f"{self.path.name}-{step}-{number}of{len(parts)}.pt")
            for number in range(1, len(parts) + 1)
        ]
        old = self._files()
        for file, part in zip(new, parts, strict=True):
            with replacing(file) as temporary:
                temporary.write_bytes(part)
        for file in set(old) - set(new):
            file.unlink()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Returns the newest state, on a device; `None` without one."""
        found: dict[tuple[int, int], dict[int, Path]] = {}
        for file, (step, number, parts) in self._files().items():
            found.setdefault((step, parts), {})[number] = file
        whole = [key for key, files in found.items() if len(files) == key[1]]
        if not whole:
            return None
        files = found[max(whole)]
        data = b"".join(files[number].read_bytes() for number in sorted(files))
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)

    def remove(self) -> None:
        """Removes all files."""
        for file in self._files():
            file.unlink()

    def _files(self) -> dict[Path, tuple[int, ...]]:
        """Returns the files with their step, number, and number of files."""
        pattern = re.compile(re.escape(self.path.name) + r"-(\d+)-(\d+)of(\d+)\.pt")
        matches = {file: pattern.fullmatch(file.name) for file in self.path.parent.glob("*.pt")}
        return {file: tuple(map(int, match.groups())) for file, match in matches.items() if match}
