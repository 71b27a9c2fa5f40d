"""Readers of Long Range Arena's published files (arXiv 2011.04006).

    listops     basic_train.tsv, basic_test.tsv: an expression, a tab, its value
    text        aclImdb: train/pos/*.txt, train/neg, test/pos, test/neg
    retrieval   new_aan_pairs.train.tsv, new_aan_pairs.test.tsv: a label (0 or 1), two names, two
                texts, separated by tabs, without a head
    image       CIFAR-10 in its binary version: data_batch_1.bin to 5 and test_batch.bin, a label
                and 3 x 32 x 32 bytes each. The python version holds pickles, which can run code
    pathfinder  metadata/*.npy, lines of text in spite of their name: a folder, a file, a number,
                the label, and more; the pictures lie in FOLDER/<folder>/<file>. FOLDER is that of
                one difficulty, such as pathfinder32/curv_contour_length_14

A reader returns the tokens [N, T] (retrieval: [N, 2, T]) and the labels [N] for training, and those
for the test. Token 0 is behind a sequence; a byte or grey pixel x is token x + 1. Texts are cut to
their first 4,000 bytes. Validation files are not read: nothing is chosen by them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from listops_data import TOKENS, VALUES, read_tsv

from megatron_patch.commands.command_line import CommandError

LONGEST = 4000  # bytes of a text
PICTURE = 32 * 32  # pixels
# The weights of red, green and blue in a grey pixel (ITU-R BT.601), which TensorFlow uses.
GREY = torch.tensor([0.2989, 0.587, 0.114])
CLASSES = dict(listops=VALUES, text=2, retrieval=2, image=10, pathfinder=2)
VOCABULARY = dict(dict.fromkeys(CLASSES, 257), listops=len(TOKENS))

Part = tuple[torch.Tensor, torch.Tensor]  # tokens and labels


def read_listops(folder: Path) -> list[Part]:
    """Returns the expressions, uint8 [N, T], and their values."""
    parts = [read_tsv(folder / f"basic_{name}.tsv") for name in ("train", "test")]
    longest = max(tokens.shape[1] for tokens, _ in parts)
    return [
        (torch.nn.functional.pad(tokens, (0, longest - tokens.shape[1])), values)
        for tokens, values in parts
    ]


def read_text(folder: Path) -> list[Part]:
    """Returns the reviews, int16 [N, 4000], and whether they are good."""
    parts = []
    for name in ("train", "test"):
        texts, labels = [], []
        for label, kind in enumerate(("neg", "pos")):
            files = sorted((folder / name / kind).glob("*.txt"))
            if not files:
                raise CommandError(f"{folder / name / kind}: found no files *.txt")
            texts += [file.read_bytes() for file in files]
            labels += [label] * len(files)
        parts.append((_bytes(texts), torch.tensor(labels)))
    return parts


def read_retrieval(folder: Path) -> list[Part]:
    """Returns the pairs of articles, int16 [N, 2, 4000], and whether one cites the other."""
    parts = []
    for name in ("train", "test"):
        path = folder / f"new_aan_pairs.{name}.tsv"
        texts, labels = [], []
        with path.open("rb") as file:
            for count, line in enumerate(file, 1):
                label, *fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != 4 or label not in (b"0", b"1", b"0.0", b"1.0"):
                    raise CommandError(
                        f"{path}:{count}: wanted 0 or 1, two names and two texts, separated by tabs"
                    )
                labels.append(int(float(label)))
                texts += fields[2:]
        if not labels:
            raise CommandError(f"{path}: found no pairs")
        parts.append((_bytes(texts).unflatten(0, (-1, 2)), torch.tensor(labels)))
    return parts


def read_image(folder: Path) -> list[Part]:
    """Returns the pictures in grey, int16 [N, 1024], row by row, and their classes."""
    size = 1 + 3 * PICTURE
    parts = []
    for names in ([f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"]):
        data = bytearray()
        for name in names:
            found = (folder / name).read_bytes()
            if not found or len(found) % size:
                raise CommandError(
                    f"{folder / name}: found {len(found)} bytes, wanted a multiple of {size}"
                )
            data += found
        rows = torch.frombuffer(data, dtype=torch.uint8).view(-1, size)
        if rows[:, 0].max() > 9:
            raise CommandError(f"{folder}: found the label {rows[:, 0].max()}, wanted 0 to 9")
        grey = (rows[:, 1:].view(-1, 3, PICTURE) * GREY[:, None]).sum(1)
        parts.append((grey.to(torch.int16) + 1, rows[:, 0].long()))
    return parts


def read_pathfinder(folder: Path) -> list[Part]:
    """Returns the pictures, int16 [N, 1024], and whether the dots are joined: the first 80 % in a
    fixed random order for training, and the last 10 % for the test, as in Long Range Arena, whose
    order is another. Empty files are left out, as there."""
    try:
        from PIL import Image
    except ImportError:
        raise CommandError(f"{folder}: needs Pillow to read it, which is not here") from None
    pixels, labels = [], []
    for list_file in sorted((folder / "metadata").glob("*.npy")):
        for count, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise CommandError(
                    f"{list_file}:{count}: wanted a folder, a file, a number, and 0 or 1"
                )
            file = folder / fields[0] / fields[1]
            if not file.stat().st_size:
                continue
            try:
                with Image.open(file) as picture:
                    grey = picture.convert("L")
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                raise CommandError(f"{file}: wanted a picture that can be read") from None
            if grey.width * grey.height != PICTURE:
                raise CommandError(f"{file}: found {grey.size} pixels, wanted 32 x 32")
            pixels.append(torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8))
            labels.append(int(fields[3]))
    if len(labels) < 10:
        raise CommandError(f"{folder}/metadata/*.npy: found {len(labels)} pictures, wanted 10")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    tokens, values = torch.stack(pixels).to(torch.int16) + 1, torch.tensor(labels)
    tenth = len(labels) // 10
    return [(tokens[part], values[part]) for part in (order[: 8 * tenth], order[-tenth:])]


def _bytes(texts: Iterable[bytes]) -> torch.Tensor:
    """Returns the first bytes of texts, plus 1, with 0 behind them: int16 [N, LONGEST]."""
    texts = list(texts)
    tokens = torch.zeros(len(texts), LONGEST, dtype=torch.int16)
    for row, text in zip(tokens, texts, strict=True):
        if not text:
            continue
        found = torch.frombuffer(bytearray(text[:LONGEST]), dtype=torch.uint8)
        row[: len(found)] = found.to(torch.int16) + 1
    return tokens


READERS: dict[str, Callable[[Path], list[Part]]] = dict(
    listops=read_listops, text=read_text, retrieval=read_retrieval, image=read_image,
    pathfinder=read_pathfinder,
)  # fmt: skip
