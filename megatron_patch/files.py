"""Opening files of others: only regular files, since a FIFO or a device has no end, and only inside
a given folder, since a link may lead anywhere."""

from __future__ import annotations

import errno
from pathlib import Path

MAX_TEXT_BYTES = 128 * 2**20  # the largest tokenizer.json files have 30 MB


def check_regular(path: Path, inside: Path | None = None) -> None:
    """Checks that `path` is a regular file, or a link to one, that with links resolved lies in the
    folder `inside`. The files of a snapshot in Hugging Face's cache are links, which may lead to
    the cache's `blobs`. Raises an OSError otherwise; `filename` and `strerror` say why."""
    try:
        real = path.resolve(strict=True)
    except RuntimeError:  # Python before 3.13
        raise OSError(errno.ELOOP, "a link that leads to itself", str(path)) from None
    except ValueError:
        raise OSError(errno.EINVAL, "a name with a NUL character", str(path)) from None
    if not real.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if inside is None:
        return
    folder = inside.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise OSError(errno.EPERM, f"refused: it leads out of {inside}, to {real}", str(path))


def read_text(path: Path, inside: Path | None = None, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Returns the UTF-8 text of a file that passes `check_regular`. Raises an OSError if it cannot
    be read or is larger than `max_bytes`; `filename` and `strerror` say why."""
    check_regular(path, inside)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes / 1e6:.0f} MB of text", str(path))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"not UTF-8, at byte {error.start}", str(path)) from None
