#!/usr/bin/env python3
"""Picture classification with MetaLA in both directions, beside softmax attention of equal size.

A picture is cut into patches, as in ViT (arXiv 2010.11929). A linear layer embeds them, a learned
vector tells the place of each. In a MetaLA layer one set of weights reads the patches forwards and
backwards, and the two results are added; so both kinds of layers have 4 d^2 weights in the mixer
(MetaLA's queries and gates have d / 2 columns each), and the models are of equal size but for the
convolution and biases. A classifier reads the mean of the last states.

    --data segments     drawn digits of seven segments, 28 x 28, which need nothing
    --data pairs        two of these side by side, a 0 or a 1 each; the class is whether they agree
    --data digits       scikit-learn's handwritten digits, 8 x 8, where it is installed
    --data FOLDER       FOLDER/CLASS/*.png and so on, as torchvision's ImageFolder; a tenth is the
                        test

Usage: scripts/reproduce/run.sh images [--data DATA] [--seeds 0 1 2]

--tiny trains one layer on pairs: both kinds of layers can compare two digits; MetaLA without
memory, which sees each patch for itself, guesses.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from classifier import Classifier, accuracy
from images_data import (
    Pictures,
    draw_digits,
    draw_pairs,
    patches_of,
    read_folder,
    sklearn_digits,
    split,
)
from models import Sizes, metala_config, prepared
from torch import nn
from training import (
    Recipe,
    add_run_arguments,
    cross_entropy,
    sweep,
    take_run_arguments,
    title_of,
    train_epochs,
)

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    existing_folder,
    number,
    one_of,
    run_script,
    whole,
)
from megatron_patch.hf import MetaLAModel
from megatron_patch.hf.attention_metala import MetaLAAttention

MODELS = ("metala", "softmax", "forward", "window")
DEFAULT = dict(
    model=["metala", "softmax", "forward"], layers=4, width=128, heads=4, kernel_size=4, size=28,
    patch=4, lr=1e-3, batch=128, epochs=30, warm_up=100, decay=0.05, examples=20_000,
    bfloat16=False, seeds=[0, 1, 2], data="segments",
)  # fmt: skip
TINY = dict(
    model=["metala", "softmax", "window"], layers=1, width=64, heads=2, kernel_size=1, size=16,
    patch=16, lr=5e-3, batch=64, epochs=30, warm_up=20, decay=0.05, examples=2048, bfloat16=False,
    seeds=[0], data="pairs",
)  # fmt: skip
SIZE_OF_DIGITS = dict(size=8, patch=2)
TEST_FRACTION = 0.1
MARGIN = 0.25  # by which --tiny shall show the effect


class BothDirections(nn.Module):
    """Adds the results of a token mixer that reads the tokens forwards and backwards."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, None, None]:
        both = self.mixer(torch.cat([x, x.flip(1)]), *others)[0]
        forwards, backwards = both.chunk(2)
        return forwards + backwards.flip(1), None, None


class FullAttention(MetaLAAttention):
    """Softmax attention of each token to all."""

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, keys, values)


class PictureModel(nn.Module):
    """Maps patches [B, T, P] to logits [B, classes].

    Args:
        name: one of MODELS. "forward" reads in one direction.
    """

    def __init__(self, name: str, sizes: Sizes, patches: int, pixels: int, classes: int):
        super().__init__()
        kind = "metala" if name == "forward" else name
        body = MetaLAModel(metala_config(kind, sizes, rope_theta=None))
        for layer in body.layers:
            if name == "softmax":
                layer.token_mixer = FullAttention(body.config)
                layer.token_mixer.apply(body._init_weights)
            elif name != "forward":
                layer.token_mixer = BothDirections(layer.token_mixer)
        body.embed_tokens = None  # patches take the place of tokens
        self.embed = nn.Linear(pixels, sizes.width)
        self.places = nn.Parameter(0.02 * torch.randn(patches, sizes.width))
        self.classifier = Classifier(prepared(kind, body), classes)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.classifier(inputs_embeds=self.embed(patches) + self.places)


def source_of_data(text: str) -> str:
    """Argument type: the name of a generator, or a folder."""
    return text if text in ("segments", "pairs", "digits") else str(existing_folder(text))


def load(case: dict[str, Any]) -> tuple[Pictures, Pictures]:
    """Returns the pictures for training and for the test: the same for all seeds."""
    if case["data"] == "segments":
        return split(draw_digits(case["examples"], case["size"], 0), TEST_FRACTION, 0)
    if case["data"] == "pairs":
        return split(draw_pairs(case["examples"], case["size"], 0), TEST_FRACTION, 0)
    if case["data"] == "digits":
        return split(sklearn_digits(), 2 * TEST_FRACTION, 0)
    return split(read_folder(Path(case["data"]), case["size"]), TEST_FRACTION, 0)


def run_case(device: torch.device, case: dict[str, Any], until: float) -> dict[str, Any]:
    """Trains by the settings that `main` makes."""
    training, test = load(case)
    patches, test_patches = (
        patches_of(part.pixels, case["patch"]).to(device) for part in (training, test)
    )
    labels, test_labels = training.labels.to(device), test.labels.to(device)
    torch.manual_seed(case["seed"])
    sizes = Sizes(
        1, case["width"], case["layers"], case["heads"], case["kernel_size"], expand_k=0.5
    )
    model = PictureModel(case["model"], sizes, *patches.shape[1:], len(training.classes))
    recipe = Recipe(
        case["lr"], case["epochs"], case["batch"], weight_decay=case["decay"],
        warm_up=case["warm_up"], bfloat16=case["bfloat16"], seed=case["seed"],
    )  # fmt: skip

    def logits_of(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        with recipe.autocast(device):
            return model(source[index])

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(patches, index), labels[index])

    def evaluate() -> float:
        of_test = functools.partial(logits_of, test_patches)
        return accuracy(model, of_test, test_labels, 4 * recipe.batch_size)

    return train_epochs(
        model, loss_of, evaluate, len(labels), recipe, device, until,
        title_of(case, ("model", "data", "seed")),
    )  # fmt: skip


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = number(lambda value: value > 0, "above 0")
    parser.add_argument("--model", type=one_of(MODELS), nargs="+", help=", ".join(MODELS))
    parser.add_argument("--data", type=source_of_data, help="segments, pairs, digits, or a folder")
    parser.add_argument("--seeds", type=whole(0), nargs="+", metavar="N")
    parser.add_argument("--lr", type=positive, metavar="RATE")
    parser.add_argument(
        "--size", type=whole(1), metavar="N", help="pixels of a side, not of digits"
    )
    for name in ("patch", "layers", "width", "heads", "kernel-size", "batch", "epochs", "examples"):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N")
    parser.add_argument("--bfloat16", action="store_true", default=None, help="by autocast")
    add_run_arguments(parser)
    args = vars(parser.parse_args())
    tiny, file, device, limits = take_run_arguments(args, "images")
    given = {name: value for name, value in args.items() if value is not None}
    settings = {**(TINY if tiny else DEFAULT)}
    if given.get("data") == "digits":
        settings |= SIZE_OF_DIGITS
        sklearn_digits()  # so that a missing package is refused before the first run
    settings |= given
    if settings["size"] % settings["patch"]:
        parser.error(f"--patch: found {settings['patch']}, wanted a divisor of the "
                     f"{settings['size']} pixels of a side")  # fmt: skip
    models, seeds = settings.pop("model"), settings.pop("seeds")
    cases = [dict(model=model, seed=seed, **settings) for seed in seeds for model in models]
    runs = sweep(file, cases, functools.partial(run_case, device), **limits)
    if tiny and not given:
        report_effect(runs)
    print(file)


def report_effect(runs: list[dict[str, Any]]) -> None:
    """Prints what mixing patches changes. Raises a CommandError if it is not plain to see."""
    found = {run["settings"]["model"]: run["accuracy"] for run in runs}
    told = ", ".join(f"{model} {value}" for model, value in found.items())
    if min(found["metala"], found["softmax"]) < found["window"] + MARGIN:
        raise CommandError(f"{told}: wanted both ahead of window by {MARGIN}")
    print(f"Pictures: {told}.")


if __name__ == "__main__":
    run_script(main)
