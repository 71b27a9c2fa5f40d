#!/usr/bin/env python3
"""The six tasks of MAD (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures",
arXiv 2403.17844) with MetaLA and its baselines.

    compression     a random sequence ends with a token at which the model shall keep all of it: an
                    MLP, told a position, reads the token there off that one hidden state
    memorization    a key is followed by a blank, where the model shall say the key's value; keys
                    and values are the same in all sequences
    in-context      pairs of a key and a value, drawn anew for each sequence; the value of a key
                    that was there before is scored
    noisy           the same with a fifth of the pairs replaced by noise
    fuzzy           the same with keys and values of one to three tokens, in the test keys of three
    copy            16 tokens between blanks, to be repeated in order at the end

The protocol is mad-lab's, written anew: width 128, two layers with a SwiGLU each, RMS norms, 12,800
examples (memorization: 256), 1,280 for the test, batches of 128, 200 epochs, AdamW, a cosine to
1e-6, bfloat16, until more than 99.9 % are right. Each task is trained with three learning rates and
two weight decays, 36 runs in all for the baseline settings, and the best accuracy counts. The
accuracy is the mean over the tokens that occur (macro), batch by batch. In the three recall tasks,
training scores each next token and the test only the values that can be known.

MetaLA has 4 heads with K = V = 32 by default, a state of 4,096 numbers a layer; the others have as
many as in mad-lab (attention 16, GLA 8), and Mamba's state is 4 a channel.

Usage: scripts/reproduce/run.sh mad --model metala softmax --jobs 4
A sweep that was interrupted goes on where it was.

--tiny trains a small selective copy with MetaLA and with "window", which is MetaLA with nothing but
the convolution to remember. The first copies, the other cannot.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator

import torch
from experiment import Experiment, Settings
from models import MODELS, LanguageModel, Sizes, build, check_models
from torch import nn
from training import IGNORED, Data, Recipe, Result, Run, made_of, scored, train_epochs

from megatron_patch.commands.command_line import one_of, run_script, whole

Row = tuple[list[int], list[int]]


def compression(rng: random.Random, case: Settings, training: bool) -> Row:
    """Returns tokens, the last of them the one to compress into, and the same as labels."""
    end = case["vocabulary"] - 1
    tokens = [rng.randrange(end) for _ in range(case["length"] - 1)] + [end]
    return tokens, tokens


def memorization(rng: random.Random, case: Settings, training: bool) -> Row:
    """Returns keys, each before the blank at which its value is the label."""
    blank = case["vocabulary"] - 1
    half = blank // 2
    values = list(range(half, blank))
    random.Random(12345).shuffle(values)  # one map for all sequences and seeds
    tokens, labels = [], []
    for _ in range(case["length"] // 2):
        key = rng.randrange(half)
        tokens += [key, blank]
        labels += [IGNORED, values[key]]
    return tokens, labels


def recall(rng: random.Random, case: Settings, training: bool) -> Row:
    """Returns pairs of a key and a value; the last key was there before."""
    words = case["vocabulary"] - case["noise_vocabulary"]
    pairs = case["length"] // 2
    certain = rng.randrange(pairs)  # never noise, so that there is a key
    known: dict[int, int] = {}
    tokens, labels = [], []
    for pair in range(pairs - 1):
        if pair != certain and rng.random() < case["noise"]:
            tokens += [rng.randrange(words, case["vocabulary"]) for _ in range(2)]
            labels += [IGNORED, IGNORED]
            continue
        key = rng.randrange(words // 2)
        seen = key in known
        value = known.setdefault(key, rng.randrange(words // 2, words))
        tokens += [key, value]
        labels += [IGNORED, value if seen else IGNORED]
    if not known:  # `certain` was the last pair, and all others noise
        return recall(rng, case, training)
    key = rng.choice(list(known))
    return _shifted([*tokens, key, known[key]], [*labels, IGNORED, known[key]], training)


def fuzzy(rng: random.Random, case: Settings, training: bool) -> Row:
    """Returns pairs of a key and a value of several tokens each; the last key was there before.

    A sequence is filled with the padding token from the left.
    """
    length, longest, padding = case["length"], 3, case["vocabulary"] - 1
    keys, values = range(padding // 2), range(padding // 2, padding)

    def draw(vocabulary: range, size: int) -> tuple[int, ...]:
        return tuple(rng.sample(vocabulary, size))

    def key_size() -> int:
        return rng.randint(1, longest) if training else longest

    last_key, last_value = draw(keys, key_size()), draw(values, rng.randint(1, longest))
    last = len(last_key) + len(last_value)
    most = length - last - 2 * longest  # tokens before the last pair that is drawn
    # mad-lab's place may lie beyond what is drawn, and the last key then be unknown. Ours does not.
    place, is_placed = rng.randrange(most - 2 * longest + 1), False
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    presented: set[tuple[int, ...]] = set()
    tokens: list[int] = []
    labels: list[int] = []
    while len(tokens) < most:
        if len(tokens) >= place and not is_placed:
            key = last_key
        else:
            key = draw(keys, key_size())
        if key == last_key:
            value, is_placed = last_value, True
        else:
            value = known.setdefault(key, draw(values, rng.randint(1, longest)))
        seen = key in presented
        presented.add(key)
        tokens += [*key, *value]
        labels += [IGNORED] * len(key) + (list(value) if seen else [IGNORED] * len(value))
    tokens += [*last_key, *last_value]
    labels += [IGNORED] * len(last_key) + list(last_value)
    missing = length + 1 - len(tokens)
    return _shifted([padding] * missing + tokens, [IGNORED] * missing + labels, training)


def _shifted(tokens: list[int], labels: list[int], training: bool) -> Row:
    """Returns what predicts the next token: all of them in training, the labelled ones else."""
    return tokens[:-1], (tokens if training else labels)[1:]


def copy(rng: random.Random, case: Settings, training: bool) -> Row:
    """Returns tokens between blanks, the token that asks for them, and as many blanks, at which
    they are the labels."""
    count, blank, ask = case["copied"], case["vocabulary"] - 2, case["vocabulary"] - 1
    word = [rng.randrange(blank) for _ in range(count)]
    before = [0] * count  # blanks before each token; none stands behind the last one
    for _ in range(case["length"] - 2 * count - 1):
        before[rng.randrange(count)] += 1
    tokens = [x for blanks, token in zip(before, word, strict=True)
              for x in [blank] * blanks + [token]]  # fmt: skip
    labels = [IGNORED] * (len(tokens) + 1) + word
    return [*tokens, ask, *[blank] * count], labels


BASE = dict(vocabulary=16, length=128, examples=12_800)
# By task: what draws a sequence, and the baseline settings.
TASKS: dict[str, tuple[Callable[[random.Random, Settings, bool], Row], Settings]] = {
    "compression": (compression, BASE | dict(length=32)),
    "fuzzy": (fuzzy, BASE),
    "in-context": (recall, BASE | dict(noise=0.0, noise_vocabulary=0)),
    "memorization": (memorization, dict(vocabulary=256, length=32, examples=256)),
    "noisy": (recall, BASE | dict(vocabulary=32, noise=0.2, noise_vocabulary=16)),
    "copy": (copy, BASE | dict(length=256, copied=16)),
}
# What else MAD varies: one setting at a time, 66 settings with the baselines, 396 runs.
SIZES = dict(vocabulary=[32, 64, 128], examples=[6400, 3200, 1600, 800])
LONGER = dict(length=[256, 512, 1024])
VARIED: dict[str, dict[str, list]] = {
    "compression": SIZES | dict(length=[64, 128, 256]),
    "fuzzy": SIZES | LONGER,
    "in-context": SIZES | LONGER,
    "memorization": dict(vocabulary=[512, 1024, 2048, 4096, 8192]),
    "noisy": SIZES | LONGER | dict(vocabulary=[48, 80, 144], noise=[0.4, 0.6, 0.8]),
    "copy": SIZES | dict(length=[512, 1024], copied=[32, 64, 96]),
}
HEADS = dict(softmax=16, gla=8)  # mad-lab's; others have 4
PAPER = dict(
    model=["metala"], task=list(TASKS), lr=[1e-4, 5e-4, 1e-3], decay=[0.0, 0.1], seed=[0],
    width=128, layers=2, heads=None, kernel_size=4, expand_k=1.0, batch=128, epochs=200,
    test_examples=1280, all=False,
)  # fmt: skip
TINY = dict(
    task=["copy"], vocabulary=8, length=16, copied=4, examples=2048, test_examples=256, batch=64,
    epochs=8, width=32, heads=2, lr=[1e-2], decay=[0.0], model=["metala", "window"],
)  # fmt: skip


class Compressing(nn.Module):
    """Reads tokens off the last hidden state: MAD's autoencoder.

    The decoder is an MLP that gets the last hidden state, without the body's last norm, plus a
    sinusoidal embedding of the position.
    """

    def __init__(self, model: LanguageModel, length: int):
        super().__init__()
        width = model.head.in_features
        parts = [(nn.RMSNorm(width, eps=1e-5), nn.Linear(width, width), nn.GELU()) for _ in "12"]
        self.decoder = nn.Sequential(
            *itertools.chain(*parts), nn.RMSNorm(width, eps=1e-5), model.head
        )
        for part in self.decoder:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.body = model.body
        self.body.final_norm = nn.Identity()
        frequencies = 10000.0 ** -torch.linspace(0, 1, width // 2)
        angles = torch.arange(length)[:, None] * frequencies
        self.register_buffer("places", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T] and positions [B, P] to logits [B, P, vocabulary]."""
        last = self.body(tokens)[0][:, -1:]
        return self.decoder(last + self.places[positions])


def draw(case: Settings, examples: int, training: bool) -> Data:
    """Returns sequences of a task. Those for training and for the test differ in their seeds."""
    function, _ = TASKS[case["task"]]
    rng = random.Random(f"{case['seed']} {training}")
    rows = [function(rng, case, training) for _ in range(examples)]
    inputs, labels = zip(*rows, strict=True)
    return scored(torch.tensor(inputs), torch.tensor(labels))


@torch.no_grad()
def macro_accuracy(model: nn.Module, data: Data, batch: int, vocabulary: int) -> float:
    """Returns the mean over batches of the mean accuracy over the tokens of the vocabulary.

    As in torchmetrics, which mad-lab uses, tokens that a batch neither has nor is said to have do
    not count, and one that it is wrongly said to have counts as 0.
    """
    model.eval()
    rows = torch.arange(len(data.labels), device=data.labels.device)
    # Few large batches go through the model: the test follows each epoch, and takes launches.
    found = torch.cat([model(*data.take(index)[0]).argmax(-1) for index in rows.split(8 * batch)])
    model.train()
    is_scored = (data.labels != IGNORED).float()
    wanted, of_batch = data.labels.clamp(min=0), (rows // batch)[:, None]

    def count(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the sums of the weights of each token, [batches, vocabulary]."""
        sums = weights.new_zeros(math.ceil(len(rows) / batch) * vocabulary)
        sums.scatter_add_(0, (of_batch * vocabulary + tokens).flatten(), weights.flatten())
        return sums.view(-1, vocabulary)

    there, said = count(wanted, is_scored), count(found, is_scored)
    right = count(wanted, is_scored * (wanted == found))
    means = (right / there.clamp(min=1)).sum(1) / ((there + said) > 0).sum(1)
    return means.mean().item()


def run_case(case: Settings, run: Run) -> Result:
    """Draws the data, and trains by the settings of a run."""
    training = draw(case, case["examples"], training=True)
    test = draw(case, case["test_examples"], training=False)
    torch.manual_seed(case["seed"])
    sizes = made_of(Sizes, case, norm="rmsnorm", mlp_beside_mamba=True, state=4)
    model: nn.Module = LanguageModel(build(case["model"], sizes), tied=False)
    if case["task"] == "compression":
        model = Compressing(model, case["length"])
    recipe = made_of(
        Recipe, case, lowest=1e-6, by_part=True, stop_above=0.999,
        bfloat16=run.device.type == "cuda",
    )  # fmt: skip
    score = functools.partial(macro_accuracy, batch=case["batch"], vocabulary=case["vocabulary"])
    batch = min(case["batch"], case["examples"])
    return train_epochs(model, training, test, recipe, run, case["epochs"], batch, score)


def expand(case: Settings) -> Iterator[Settings]:
    """Yields a task's baseline settings, and those of the whole benchmark with --all."""
    case = dict(case)
    varied = VARIED[case["task"]] if case.pop("all") else {}
    heads = case["heads"] or HEADS.get(case["model"], 4)
    base = TASKS[case["task"]][1] | case | dict(heads=heads)
    yield base
    for name, values in varied.items():
        for value in values:
            yield base | {name: value}


EXPERIMENT = Experiment(
    "mad", PAPER, TINY, ("model", "task", "seed", "lr", "decay"), run_case, expand=expand,
    kinds={"model": one_of(MODELS), "task": one_of(TASKS), "heads": whole(1)},
    check=lambda settings: check_models(settings["model"]),
    effect=(lambda found: found["metala"] > 0.9 and found["window"] < 0.6,
            "above 0.9 with the recurrence, and below 0.6 without it"),
)  # fmt: skip

if __name__ == "__main__":
    run_script(EXPERIMENT.main)
