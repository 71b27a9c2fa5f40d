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

Usage: scripts/reproduce/run.sh images [--data DATA] [--seed 0 1 2]

--tiny trains one layer on pairs: both kinds of layers can compare two digits; MetaLA without
memory, which sees each patch for itself, guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from classifier import Classifier
from experiment import Experiment, Settings
from images_data import (
    Pictures,
    draw_digits,
    draw_pairs,
    patches_of,
    read_folder,
    sklearn_digits,
    split,
)
from models import Sizes, build
from torch import nn
from training import Data, Recipe, Result, Run, made_of, train_epochs

from megatron_patch.commands.command_line import (
    CommandError,
    existing_folder,
    one_of,
    run_script,
)
from megatron_patch.hf.attention_metala import MetaLAAttention

MODELS = ("metala", "softmax", "forward", "window")
USUAL = dict(
    seed=[0, 1, 2], model=["metala", "softmax", "forward"], data="segments", layers=4, width=128,
    heads=4, kernel_size=4, size=28, patch=4, lr=1e-3, batch=128, epochs=30, warm_up=100,
    decay=0.05, examples=20_000, bfloat16=False,
)  # fmt: skip
TINY = dict(
    seed=[0], model=["metala", "softmax", "window"], data="pairs", layers=1, width=64, heads=2,
    kernel_size=1, size=16, patch=16, lr=3e-3, batch=64, warm_up=20, examples=2048, epochs=16,
)  # fmt: skip
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
        body = build("metala" if name == "forward" else name, sizes, rope_theta=None)
        for layer in body.layers:
            if name == "softmax":
                layer.token_mixer = FullAttention(body.config)
                layer.token_mixer.apply(body._init_weights)
            elif name != "forward":
                layer.token_mixer = BothDirections(layer.token_mixer)
        body.embed_tokens = None  # patches take the place of tokens
        self.embed = nn.Linear(pixels, sizes.width)
        self.places = nn.Parameter(0.02 * torch.randn(patches, sizes.width))
        self.classifier = Classifier(body, classes)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        hidden = self.classifier.body(inputs_embeds=self.embed(patches) + self.places)[0]
        return self.classifier.classify(hidden.mean(1))


def load(case: Settings) -> tuple[Pictures, Pictures]:
    """Returns the pictures for training and for the test: the same for all seeds."""
    if case["data"] == "segments":
        return split(draw_digits(case["examples"], case["size"], 0), TEST_FRACTION, 0)
    if case["data"] == "pairs":
        return split(draw_pairs(case["examples"], case["size"], 0), TEST_FRACTION, 0)
    if case["data"] == "digits":
        return split(sklearn_digits(), 2 * TEST_FRACTION, 0)
    return split(read_folder(Path(case["data"]), case["size"]), TEST_FRACTION, 0)


def run_case(case: Settings, run: Run) -> Result:
    """Draws or reads the pictures, and trains by the settings of a run."""
    pictures = load(case)
    training, test = (
        Data((patches_of(part.pixels, case["patch"]),), part.labels) for part in pictures
    )
    torch.manual_seed(case["seed"])
    sizes = made_of(Sizes, case, vocabulary=1, expand_k=0.5)
    shape = training.inputs[0].shape[1:]
    model = PictureModel(case["model"], sizes, *shape, len(pictures[0].classes))
    recipe = made_of(Recipe, case)
    return train_epochs(model, training, test, recipe, run, case["epochs"], case["batch"])


def source_of_data(text: str) -> str:
    """Argument type: the name of a generator, or a folder."""
    return text if text in ("segments", "pairs", "digits") else str(existing_folder(text))


def check(settings: Settings) -> None:
    """Raises a CommandError for data that cannot be had or cut into patches."""
    if settings["data"] == "digits":
        sklearn_digits()
    elif settings["size"] % settings["patch"]:
        raise CommandError(f"--patch: found {settings['patch']}, wanted a divisor of the "
                           f"{settings['size']} pixels of a side")  # fmt: skip


def expand(case: Settings) -> Iterator[Settings]:
    """Yields the settings of a run. Scikit-learn's digits have 8 pixels a side, 4 x 4 patches."""
    yield case | (dict(size=8, patch=2) if case["data"] == "digits" else {})


EXPERIMENT = Experiment(
    "images", USUAL, TINY, ("seed", "model"), run_case, check=check, expand=expand,
    kinds={"model": one_of(MODELS), "data": source_of_data},
    effect=(lambda found: min(found["metala"], found["softmax"]) > found["window"] + MARGIN,
            f"both ahead of window by {MARGIN}"),
)  # fmt: skip

if __name__ == "__main__":
    run_script(EXPERIMENT.main)
