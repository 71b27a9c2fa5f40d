"""Long Range Arena's published formats, read from files made here, and trained on."""

from __future__ import annotations

import math
from pathlib import Path

import lra
import lra_data
import pytest
import torch

from megatron_patch.commands.command_line import CommandError


def text_of(row: torch.Tensor) -> bytes:
    """Returns the bytes of a row of tokens, up to the padding."""
    tokens = row[row != 0] - 1
    assert (row[len(tokens) :] == 0).all()
    return bytes(tokens.tolist())


def make_listops(folder: Path) -> None:
    for name, values in (("train", range(8)), ("test", range(4))):
        lines = [f"( ( ( [SM 2 ) {x} ) ] )\t{2 + x}\n" for x in values]
        (folder / f"basic_{name}.tsv").write_text("Source\tTarget\n" + "".join(lines))


def make_text(folder: Path) -> None:
    for part, copies in (("train", 5), ("test", 2)):
        for kind in ("pos", "neg"):
            (folder / part / kind).mkdir(parents=True)
            for copy in range(copies):
                text = f"{kind} ünd {copy}".encode() + b"x" * 5000 * copy
                (folder / part / kind / f"{copy}_7.txt").write_bytes(text)
        (folder / part / "unsup").mkdir()


def make_retrieval(folder: Path) -> None:
    for part, count in (("train", 8), ("test", 2)):
        lines = [f'{x % 2}.0\tP{x}\tQ{x}\tfirst {x}\tsecond {x}, "quoted"\n' for x in range(count)]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(lines))


def make_image(folder: Path) -> None:
    for number, name in enumerate([*(f"data_batch_{x}" for x in range(1, 6)), "test_batch"]):
        rows = b""
        for label in (number, 9 - number):
            rows += bytes([label]) + bytes([10 * number] * 1024 + [100] * 1024 + [255] * 1024)
        (folder / f"{name}.bin").write_bytes(rows)


def make_pathfinder(folder: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    (folder / "metadata").mkdir()
    for part in range(2):
        (folder / "imgs" / str(part)).mkdir(parents=True)
        lines = []
        for count in range(10):
            file = f"imgs/{part}/sample_{count}.png"
            Image.new("L", (32, 32), 100 * (count % 2) + count).save(folder / file)
            lines.append(f"imgs/{part} sample_{count}.png 0 {count % 2} 1.8 6 2 1.5\n")
        (folder / f"imgs/{part}/sample_empty.png").touch()
        lines.append(f"imgs/{part} sample_empty.png 0 1\n")
        (folder / "metadata" / f"{part}.npy").write_text("".join(lines))


MAKE = dict(
    listops=make_listops, text=make_text, retrieval=make_retrieval, image=make_image,
    pathfinder=make_pathfinder,
)  # fmt: skip


def test_text(tmp_path):
    make_text(tmp_path)
    (tokens, labels), (_, test_labels) = lra_data.read_text(tmp_path)
    assert tokens.shape == (10, 4000) and labels.tolist() == 5 * [0] + 5 * [1]
    assert text_of(tokens[0]) == "neg ünd 0".encode()
    assert text_of(tokens[9]) == ("pos ünd 4".encode() + b"x" * 4000)[:4000]
    assert test_labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(CommandError, match="pos/train/neg: found no files"):
        lra_data.read_text(tmp_path / "train" / "pos")


def test_retrieval(tmp_path):
    make_retrieval(tmp_path)
    (tokens, labels), _ = lra_data.read_retrieval(tmp_path)
    assert tokens.shape == (8, 2, 4000) and labels.tolist() == 4 * [0, 1]
    assert text_of(tokens[3, 0]) == b"first 3" and text_of(tokens[3, 1]) == b'second 3, "quoted"'
    file = tmp_path / "new_aan_pairs.test.tsv"
    file.write_text(file.read_text() + "2\ta\tb\tc\td\n")
    with pytest.raises(CommandError, match="test.tsv:3: wanted 0 or 1, two names"):
        lra_data.read_retrieval(tmp_path)


def test_image(tmp_path):
    make_image(tmp_path)
    (tokens, labels), (test_tokens, test_labels) = lra_data.read_image(tmp_path)
    assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test_labels.tolist() == [5, 4]
    assert tokens.shape == (10, 1024)
    for number in range(5):
        grey = int(0.2989 * 10 * number + 0.587 * 100 + 0.114 * 255)
        assert (tokens[2 * number] == grey + 1).all()
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 3072)
    with pytest.raises(CommandError, match="found 3072 bytes, wanted a multiple of 3073"):
        lra_data.read_image(tmp_path)


def test_pathfinder(tmp_path):
    make_pathfinder(tmp_path)
    (tokens, labels), (test_tokens, test_labels) = lra_data.read_pathfinder(tmp_path)
    assert tokens.shape == (16, 1024) and test_tokens.shape == (2, 1024)
    for rows, values in ((tokens, labels), (test_tokens, test_labels)):
        assert torch.equal((rows[:, 0] > 50).long(), values)
    file = tmp_path / "metadata" / "0.npy"
    file.write_text("imgs/0 sample_0.png 0\n")
    with pytest.raises(CommandError, match="0.npy:1: wanted a folder, a file, a number"):
        lra_data.read_pathfinder(tmp_path)


@pytest.mark.parametrize("task", MAKE)
def test_each_task_trains(task, tmp_path, command):
    folder = tmp_path / "data"
    folder.mkdir()
    MAKE[task](folder)
    sizes = "--layers 1 --width 16 --batch 4 --steps 2 --warm-up 1".split()
    (run,) = command(lra, "--task", task, "--data", str(folder), *sizes)
    assert run["settings"]["data"] == str(folder) and "examples" not in run["settings"]
    wanted = math.log(lra_data.CLASSES[task])  # of a classifier that knows nothing
    assert run["steps"] >= 2 and run["losses"][0] == pytest.approx(wanted, abs=0.5)
