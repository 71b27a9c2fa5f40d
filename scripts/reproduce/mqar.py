#!/usr/bin/env python3
"""Multi-query associative recall (MQAR; Arora et al., "Zoology", arXiv 2312.04927) with MetaLA and
its baselines.

A sequence lists pairs of a key and a value, and later shows each key once more, where the model
shall predict its value. The paper of MetaLA has 80 pairs in 512 tokens (its table 4 and appendix):
accuracy 28.5 % at width 64 and 90.4 % at 128. Data and training are zoology's, written anew:

    pairs       keys from the lower half of the vocabulary without 0, values from the upper half,
                no key and no value twice in a sequence
    queries     at every second position behind the pairs. The one at slot i = 1, 2, ... is drawn
                with probability proportional to i^(a - 1), a = 0.01, without replacement: soon
                after the pairs more often than late
    the rest    token 0
    labels      at the queries alone
    model       LayerNorm, SwiGLU, the head tied to the embedding, normal(0.02); MetaLA has no
                position embeddings
    training    100,000 examples of this one length and number of pairs, batches of 128, 64 epochs,
                AdamW with decay 0.1 on all parameters, cosine without warm-up, until 99 % are right

Ours differ in three points: each epoch has a new order, embeddings have no dropout, and products
are in bfloat16 (--float32 for TF32).

Usage: scripts/reproduce/run.sh mqar --model metala softmax --width 64 128 --jobs 4
A sweep that was interrupted goes on where it was; so does a run that --minutes cut off.

--tiny trains one layer on sequences of 16 tokens, with the short convolution and without it. A
single layer binds a key to the value behind it only if something joins the two tokens first, which
is what the convolution does: with it the layer recalls, without it it guesses one of the 4 values.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from models import MODELS, Sizes, build
from training import (
    IGNORED,
    Recipe,
    Result,
    Sequences,
    Settings,
    add_run_arguments,
    sweep,
    take_run_arguments,
    title_of,
    train,
)  # fmt: skip

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    number,
    one_of,
    run_script,
    whole,
)

# numpy.logspace(-4, -2, 4), which is zoology's, and logspace(-5, -3, 4). The best one counts.
LEARNING_RATES = (1e-5, 4.6416e-5, 1e-4, 2.1544e-4, 4.6416e-4, 1e-3, 2.1544e-3, 1e-2)
PAPER = dict(
    model=["metala"], width=[64, 128], layers=2, kernel_size=2, length=512, pairs=80,
    vocabulary=8192, examples=100_000, test_examples=3000, batch=128, epochs=64, lr=LEARNING_RATES,
    seeds=[0], float32=False,
)  # fmt: skip
TINY = dict(
    model=["metala"], width=[32], layers=1, kernel_size=2, length=16, pairs=4, vocabulary=32,
    examples=4096, test_examples=512, batch=64, epochs=16, lr=[1e-2], seeds=[0],
    float32=True,
)  # fmt: skip


@dataclass(frozen=True)
class Recall:
    """A recall task.

    Attributes:
        length: tokens in a sequence, even.
        pairs: key-value pairs in a sequence; at most a quarter of the length.
        vocabulary: tokens, half of them keys (and the filler 0), half values.
        power: a, how the distance of queries is distributed; 1 is uniform.
    """

    length: int = 512
    pairs: int = 80
    vocabulary: int = 8192
    power: float = 0.01

    def draw(self, examples: int, generator: torch.Generator) -> Sequences:
        """Returns `examples` sequences."""
        half, slots = self.vocabulary // 2, self.length // 2 - self.pairs
        shape = (examples, self.pairs)
        keys = 1 + choose(half - 1, shape, generator)
        values = half + choose(self.vocabulary - half, shape, generator)
        weights = torch.arange(1, slots + 1).double() ** (self.power - 1)
        places = weights.expand(examples, -1).multinomial(self.pairs, generator=generator)
        queries = 2 * (self.pairs + places)
        inputs = torch.zeros(examples, self.length, dtype=torch.int64)
        inputs[:, 0 : 2 * self.pairs : 2] = keys
        inputs[:, 1 : 2 * self.pairs : 2] = values
        inputs.scatter_(1, queries, keys)
        labels = torch.full_like(inputs, IGNORED).scatter_(1, queries, values)
        return Sequences(inputs, labels)


def choose(count: int, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Returns rows of different numbers below `count` in random order, int64 [rows, columns].

    Floyd's algorithm: it needs one random number for each one drawn, not for each to draw from.
    """
    rows, columns = shape
    chosen = torch.empty(shape, dtype=torch.int64)
    for column in range(columns):
        last = count - columns + column
        drawn = torch.randint(last + 1, (rows, 1), generator=generator)
        is_taken = (chosen[:, :column] == drawn).any(1)
        chosen[:, column] = torch.where(is_taken, last, drawn[:, 0])
    return chosen.gather(1, torch.rand(shape, generator=generator).argsort(1))


def run_case(device: torch.device, folder: Path, case: Settings, until: float) -> Result:
    """Trains by the settings that `main` makes. A run that time cut off goes on from `folder`."""
    task = Recall(case["length"], case["pairs"], case["vocabulary"])
    generator = torch.Generator().manual_seed(case["seed"])
    data = [task.draw(case[name], generator) for name in ("examples", "test_examples")]
    torch.manual_seed(case["seed"])
    sizes = Sizes(
        case["vocabulary"], case["width"], case["layers"], kernel_size=case["kernel_size"]
    )
    model = build(case["model"], sizes)
    recipe = Recipe(
        case["lr"], case["epochs"], case["batch"], weight_decay=0.1, stop_at=0.99,
        bfloat16=not case["float32"], seed=case["seed"],
    )  # fmt: skip
    title = title_of(case, ("model", "width", "kernel_size", "lr", "seed"))
    code = hashlib.md5(json.dumps(case, sort_keys=True).encode()).hexdigest()
    return train(model, *data, recipe, device, until, title, folder / f"mqar-{code}.pt")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = number(lambda value: value > 0, "above 0")
    several = dict(nargs="+", metavar="N")
    parser.add_argument("--model", type=one_of(MODELS), nargs="+", help=", ".join(MODELS))
    parser.add_argument("--width", type=whole(2), **several)
    parser.add_argument("--lr", type=positive, **several, help="by default all of the sweep")
    parser.add_argument("--seeds", type=whole(0), **several)
    parser.add_argument("--kernel-size", type=whole(1), metavar="N", help="1: no convolution")
    for name in ("length", "pairs", "vocabulary", "layers", "examples", "epochs", "batch"):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N")
    parser.add_argument("--test-examples", type=whole(1), metavar="N")
    parser.add_argument(
        "--float32", action=argparse.BooleanOptionalAction, help="products in TF32, not bfloat16"
    )
    add_run_arguments(parser)
    args = vars(parser.parse_args())
    tiny, file, device, limits = take_run_arguments(args, "mqar")

    given = {name: value for name, value in args.items() if value is not None}
    settings = {**(TINY if tiny else PAPER), **given}
    if settings["length"] % 2 or 4 * settings["pairs"] > settings["length"]:
        parser.error(f"--pairs: found {settings['pairs']}, wanted at most a quarter of an even "
                     f"length, which is {settings['length']}")  # fmt: skip
    # Each key, and each value, comes from one half of the vocabulary and is used once a sequence.
    if settings["vocabulary"] % 2 or settings["vocabulary"] // 2 <= settings["pairs"]:
        parser.error(f"--vocabulary: found {settings['vocabulary']}, wanted an even number above "
                     f"{2 * settings['pairs']}")  # fmt: skip
    models, widths, rates, seeds = (
        settings.pop(name) for name in ("model", "width", "lr", "seeds")
    )
    kernel_sizes = [settings.pop("kernel_size")]
    if tiny and "kernel_size" not in given:
        kernel_sizes.append(1)
    cases = [
        dict(model=model, width=width, kernel_size=kernel_size, lr=rate, seed=seed, **settings)
        for model in models
        for width in widths
        for kernel_size in kernel_sizes
        for seed in seeds
        for rate in rates
    ]
    for model in models:  # so that one that is not installed is refused before the first run
        build(model, Sizes(vocabulary=8, width=16))
    runs = sweep(file, cases, functools.partial(run_case, device, file.parent), **limits)
    if tiny and len(kernel_sizes) == 2 and len(runs) == len(cases):
        report_effect(runs)
    print(file)


def report_effect(runs: list[Result]) -> None:
    """Prints what the convolution changes. Raises a CommandError if it is not plain to see."""
    accuracies = {
        size: [run["accuracy"] for run in runs if run["settings"]["kernel_size"] == size]
        for size in (2, 1)
    }
    told = f"with the convolution {accuracies[2]}, without it {accuracies[1]}"
    if min(accuracies[2]) < 0.9 or max(accuracies[1]) > 0.6:
        raise CommandError(f"{told}: wanted at least 0.9, and at most 0.6")
    print(f"Recall {told}.")


if __name__ == "__main__":
    run_script(main)
