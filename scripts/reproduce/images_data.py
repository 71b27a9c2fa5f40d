"""Pictures to classify: scikit-learn's digits, any folder with one subfolder a class, and drawn
digits of seven segments, which need nothing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_patch.commands.command_line import CommandError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# The ends (x, y) of the segments in a box of 1 by 2, and the segments of the digits 0 to 9.
ENDS = dict(
    a=(0, 0, 1, 0), b=(1, 0, 1, 1), c=(1, 1, 1, 2), d=(0, 2, 1, 2), e=(0, 1, 0, 2), f=(0, 0, 0, 1),
    g=(0, 1, 1, 1),
)  # fmt: skip
SEGMENTS = "abcdef bc abged abgcd fgbc afgcd afgedc abc abcdefg abcfgd".split()


class Pictures(NamedTuple):
    """Pictures with their classes.

    Attributes:
        pixels: uint8 [N, C, S, S] (of `draw_pairs` twice as wide).
        labels: int64 [N].
        classes: the names of the classes.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list[str]


def draw_digits(
    count: int,
    size: int,
    seed: int,
    digits: torch.Tensor | None = None,
    spread: float = 1.0,
) -> Pictures:
    """Draws digits of seven segments, of random place, size, slant, thickness and noise.

    Args:
        digits: int64 [count], which ones; `None` for random ones.
        spread: 1 for all places, sizes, slants and thicknesses; 0 for those in the middle alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> torch.Tensor:
        part = 0.5 + spread * (torch.rand(count, 1, 1, generator=generator) - 0.5)
        return low + (high - low) * part

    labels = torch.randint(10, (count,), generator=generator) if digits is None else digits
    width = between(0.2, 0.32)  # of the box, as a part of the picture, as are all lengths
    left, top = between(0.12, 0.48), between(0.1, 0.9) * (0.76 - 2 * width) + 0.08
    slant, thickness = between(-0.2, 0.2), between(0.02, 0.05)
    places = (torch.arange(size) + 0.5) / size
    y = (places[:, None] - top) / width
    x = (places[None, :] - left) / width + slant * (y - 1)
    on = torch.tensor([[name in segments for name in ENDS] for segments in SEGMENTS])[labels]
    ink = torch.zeros(count, size, size)
    for lit, (x1, y1, x2, y2) in zip(on.T, ENDS.values(), strict=True):
        along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)).clamp(0, 1)
        distance = torch.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)) * width
        drawn = ((thickness - distance) * size + 0.5).clamp(0, 1)
        ink = torch.where(lit[:, None, None], ink.maximum(drawn), ink)
    noise = 0.15 * torch.randn(ink.shape, generator=generator)
    pixels = (255 * (0.8 * ink + 0.1 + noise).clamp(0, 1)).to(torch.uint8)
    return Pictures(pixels[:, None], labels, [str(digit) for digit in range(10)])


def draw_pairs(count: int, size: int, seed: int) -> Pictures:
    """Draws two digits side by side, each a 0 or a 1. The class is whether they are equal, which
    no patch shows by itself. The pictures are [N, 1, S, 2 S]."""
    digits = torch.randint(2, (2, count), generator=torch.Generator().manual_seed(seed))
    halves = [draw_digits(count, size, seed + 1 + side, digits[side], 0.3) for side in range(2)]
    pixels = torch.cat([half.pixels for half in halves], -1)
    return Pictures(pixels, (digits[0] == digits[1]).long(), ["different", "equal"])


def sklearn_digits() -> Pictures:
    """Returns scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise CommandError("digits: needs scikit-learn, which is not installed here") from None
    found = load_digits()
    pixels = (torch.from_numpy(found.images) * (255 / 16)).to(torch.uint8)
    return Pictures(
        pixels[:, None], torch.from_numpy(found.target).long(), [str(x) for x in found.target_names]
    )


def read_folder(folder: Path, size: int) -> Pictures:
    """Reads FOLDER/CLASS/*.png and so on (torchvision's ImageFolder), in colour.

    The shorter side is scaled to `size` pixels; of the longer one the middle is kept. Raises a
    CommandError if there are no two classes, or a picture cannot be read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise CommandError(f"{folder}: needs Pillow to read it, which is not installed") from None
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) < 2:
        raise CommandError(f"{folder}: found {len(names)} folders of pictures, wanted one a class")
    pixels, labels = [], []
    for label, name in enumerate(names):
        files = [x for x in sorted((folder / name).rglob("*")) if x.suffix.lower() in SUFFIXES]
        if not files:
            raise CommandError(f"{folder / name}: found no pictures ({' '.join(SUFFIXES)})")
        for file in files:
            try:
                with Image.open(file) as picture:
                    square = ImageOps.fit(picture.convert("RGB"), (size, size))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                raise CommandError(f"{file}: wanted a picture that can be read") from None
            pixels.append(torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8))
            labels.append(label)
    stacked = torch.stack(pixels).unflatten(1, (size, size, 3)).permute(0, 3, 1, 2)
    return Pictures(stacked.contiguous(), torch.tensor(labels), names)


def split(pictures: Pictures, fraction: float, seed: int) -> tuple[Pictures, Pictures]:
    """Returns a random 1 - `fraction` for training, and the rest for the test."""
    order = torch.randperm(len(pictures.labels), generator=torch.Generator().manual_seed(seed))
    first = len(order) - max(1, round(fraction * len(order)))
    return tuple(
        Pictures(pictures.pixels[part], pictures.labels[part], pictures.classes)
        for part in (order[:first], order[first:])
    )


def patches_of(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Cuts uint8 [N, C, H, W] into patches, row by row: float32 [N, H W / patch^2, C patch^2], from
    -1 to 1. Both sides are multiples of `patch`."""
    columns = F.unfold(pixels.float() / 127.5 - 1, kernel_size=patch, stride=patch)
    return columns.transpose(1, 2).contiguous()
