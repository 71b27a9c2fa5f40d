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
    model       LayerNorm, the head tied to the embedding, normal(0.02); MetaLA has a SwiGLU and
                no position embeddings, Mamba no SwiGLU
    training    100,000 examples of this one length and number of pairs, batches of 128, 64 epochs,
                AdamW with decay 0.1 on all parameters, cosine without warm-up, until 99 % are right

docs/reproduction.md lists where ours differ.

Usage: scripts/reproduce/run.sh mqar --model metala softmax --width 64 128 --jobs 4
A sweep that was interrupted goes on where it was; so does a run that --minutes cut off.

--tiny trains one layer on sequences of 16 tokens, with the short convolution and without it. A
single layer binds a key to the value behind it only if something joins the two tokens first, which
is what the convolution does: with it the layer recalls, without it it guesses one of the 4 values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from experiment import Experiment, Settings
from models import MODELS, LanguageModel, Sizes, build, check_models
from training import IGNORED, Data, Recipe, Result, Run, made_of, scored, train_epochs

from megatron_patch.commands.command_line import CommandError, one_of, run_script

# numpy.logspace(-4, -2, 4), which is zoology's, and logspace(-5, -3, 4). The best one counts.
LEARNING_RATES = [1e-5, 4.6416e-5, 1e-4, 2.1544e-4, 4.6416e-4, 1e-3, 2.1544e-3, 1e-2]
PAPER = dict(
    model=["metala"], width=[64, 128], layers=2, kernel_size=[2], length=512, pairs=80,
    vocabulary=8192, examples=100_000, test_examples=3000, batch=128, epochs=64, lr=LEARNING_RATES,
    seed=[0], float32=False,
)  # fmt: skip
TINY = dict(
    width=[32], layers=1, kernel_size=[2, 1], length=16, pairs=4, vocabulary=32, examples=4096,
    test_examples=512, batch=64, epochs=8, lr=[1e-2], float32=True,
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

    def draw(self, examples: int, generator: torch.Generator) -> Data:
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
        return scored(inputs, labels)


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


@functools.lru_cache(maxsize=1)
def draw(task: Recall, examples: int, test_examples: int, seed: int) -> list[Data]:
    """Returns the examples for training and for the test. Runs of a process share them."""
    generator = torch.Generator().manual_seed(seed)
    return [task.draw(count, generator) for count in (examples, test_examples)]


def run_case(case: Settings, run: Run) -> Result:
    """Draws the data, and trains by the settings of a run."""
    data = draw(made_of(Recall, case), case["examples"], case["test_examples"], case["seed"])
    torch.manual_seed(case["seed"])
    model = LanguageModel(build(case["model"], made_of(Sizes, case)))
    recipe = made_of(
        Recipe, case, decay=0.1, by_part=True, stop_above=0.99, bfloat16=not case["float32"]
    )
    return train_epochs(model, *data, recipe, run, case["epochs"], case["batch"])


def check(settings: Settings) -> None:
    """Raises a CommandError for a task that cannot be drawn, or a model that is not here."""
    length, pairs, vocabulary = (settings[name] for name in ("length", "pairs", "vocabulary"))
    if length % 2 or 4 * pairs > length:
        raise CommandError(f"--pairs: found {pairs}, wanted at most a quarter of an even length, "
                           f"which is {length}")  # fmt: skip
    # Each key, and each value, comes from one half of the vocabulary and is used once a sequence.
    if vocabulary % 2 or vocabulary // 2 <= pairs:
        raise CommandError(f"--vocabulary: found {vocabulary}, wanted an even number above "
                           f"{2 * pairs}")  # fmt: skip
    check_models(settings["model"])


EXPERIMENT = Experiment(
    "mqar", PAPER, TINY, ("model", "width", "kernel_size", "seed", "lr"), run_case,
    kinds={"model": one_of(MODELS)}, check=check,
    effect=(lambda found: found[2] > 0.9 and found[1] < 0.6,
            "above 0.9 with the convolution, and below 0.6 without it"),
)  # fmt: skip

if __name__ == "__main__":
    run_script(EXPERIMENT.main)
