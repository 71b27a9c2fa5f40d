"""Pictures: data, both directions, equal sizes, and --tiny."""

from __future__ import annotations

import images
import pytest
import torch
from images_data import draw_digits, draw_pairs, patches_of, read_folder, sklearn_digits, split
from models import Sizes

from megatron_patch.commands.command_line import CommandError

SIZES = Sizes(1, 32, layers=2, heads=2, kernel_size=4, expand_k=0.5)


def test_patches_are_cut_row_by_row():
    pixels = torch.arange(2 * 3 * 4 * 8, dtype=torch.uint8).view(2, 3, 4, 8)
    patches = patches_of(pixels, 2)
    assert patches.shape == (2, 8, 12)
    wanted = pixels[1, :, 2:4, 2:4].flatten().float() / 127.5 - 1  # row 1, column 1 of 4
    assert torch.equal(patches[1, 5], wanted)


def test_drawn_digits_show_their_class():
    """An 8 has seven segments, a 1 two."""
    digits = draw_digits(2000, 28, 0)
    assert digits.pixels.shape == (2000, 1, 28, 28) and set(digits.labels.tolist()) == set(
        range(10)
    )
    ink = digits.pixels.float().mean((1, 2, 3))
    eight, one = (ink[digits.labels == digit].mean() for digit in (8, 1))
    assert eight > 1.2 * one


def looks_like_a_one(pixels: torch.Tensor) -> bool:
    """Whether the ink of a picture [S, S] lies along one line: a 0 has two sides."""
    y, x = (pixels > 190).nonzero().double().T
    points = torch.stack([y, torch.ones_like(y)], 1)
    line = points @ torch.linalg.lstsq(points, x[:, None]).solution
    return bool((x - line[:, 0]).abs().median() < 0.05 * len(pixels))


def test_a_pairs_class_is_whether_its_halves_agree():
    pairs = draw_pairs(200, 64, 0)
    for pixels, label in zip(pairs.pixels[:, 0], pairs.labels.tolist(), strict=True):
        left, right = (looks_like_a_one(half) for half in pixels.chunk(2, dim=1))
        assert (left == right) == bool(label)
    assert 60 < pairs.labels.sum() < 140


def test_a_folder_of_pictures(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for count in range(2):
            Image.new("RGB", (20, 10), colour).save(tmp_path / name / f"{count}.png")
        (tmp_path / name / "notes.txt").write_text("no picture")
    found = read_folder(tmp_path, 8)
    assert found.classes == ["blue", "red"] and found.labels.tolist() == [0, 0, 1, 1]
    assert found.pixels.shape == (4, 3, 8, 8)
    assert found.pixels[3, :, 4, 4].tolist() == [255, 0, 0]
    (tmp_path / "red" / "2.png").write_text("no picture either")
    with pytest.raises(CommandError, match="2.png: wanted a picture that can be read"):
        read_folder(tmp_path, 8)
    with pytest.raises(CommandError, match="found 0 folders"):
        read_folder(tmp_path / "red", 8)


def test_a_split_keeps_all():
    whole = draw_digits(50, 8, 0)
    training, test = split(whole, 0.1, 0)
    assert (len(training.labels), len(test.labels)) == (45, 5)
    rows = torch.cat([training.pixels, test.pixels]).flatten(1).tolist()
    assert sorted(rows) == sorted(whole.pixels.flatten(1).tolist())


def test_scikit_learns_digits():
    pytest.importorskip("sklearn")
    digits = sklearn_digits()
    assert digits.pixels.shape == (1797, 1, 8, 8) and digits.pixels.max() == 255


@pytest.mark.parametrize(
    ("name", "sees_later"), [("metala", True), ("softmax", True), ("forward", False)]
)
def test_who_sees_what_comes_later(name, sees_later):
    torch.manual_seed(0)
    model = images.PictureModel(name, SIZES, patches=6, pixels=4, classes=3).double()
    x = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    first = model.classifier.body(inputs_embeds=x)[0][0, 0, 0]
    (gradient,) = torch.autograd.grad(first, x)
    assert bool((gradient[0, 1:].abs().sum(1) > 0).all()) == sees_later


def test_both_directions_have_equal_weights():
    """Reversing the patches reverses the results."""
    torch.manual_seed(0)
    body = images.PictureModel("metala", SIZES, 6, 4, 3).double().classifier.body
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted, found = body(inputs_embeds=x)[0].flip(1), body(inputs_embeds=x.flip(1))[0]
    assert torch.allclose(wanted, found, rtol=1e-10, atol=1e-12)


def test_models_are_of_equal_size():
    sizes = Sizes(1, 128, layers=4, heads=4, kernel_size=4, expand_k=0.5)
    metala, softmax = (
        sum(weight.numel() for weight in images.PictureModel(name, sizes, 49, 16, 10).parameters())
        for name in ("metala", "softmax")
    )
    assert metala == pytest.approx(softmax, rel=0.005)


def test_mixing_patches_matters(command):
    runs = command(images, "--tiny")
    found = {run["settings"]["model"]: run["accuracy"] for run in runs}
    assert min(found["metala"], found["softmax"]) > found["window"] + images.MARGIN


def test_refusals(command, capsys, tmp_path):
    with pytest.raises(CommandError, match="--patch: found 5, wanted a divisor of the 16 pixels"):
        command(images, "--tiny", "--patch", "5")
    with pytest.raises(SystemExit):
        command(images, "--data", str(tmp_path / "nothing"))
    assert "--data: found" in capsys.readouterr().err
