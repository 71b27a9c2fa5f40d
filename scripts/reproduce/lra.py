#!/usr/bin/env python3
"""Long Range Arena (arXiv 2011.04006) with MetaLA and its baselines: sequences to classify.

    listops     an expression of 501 to 1,999 tokens, such as `[MAX 4 3 [MIN 2 3 ] 1 0 ]`, has one
                of ten values. Drawn by our own generator; --data reads the published files instead
    text        a film review, byte by byte, is good or bad (IMDB)
    retrieval   of two articles, byte by byte, one cites the other or does not (AAN)
    image       a grey picture of 32 x 32, pixel by pixel, shows one of ten things (CIFAR-10)
    pathfinder  two dots in a picture of 32 x 32, pixel by pixel, are joined by a line or are not

All but listops need a download, which --data FOLDER names; lra_data.py tells the formats.

The paper of MetaLA has 59.34 % on ListOps (S4 59.60, Mamba 38.02), with the settings that are the
defaults here, for the other tasks too:

    model       depth 6, width 32, queries 16 wide, SwiGLU 64, one direction; a classifier on the
                mean of the last states
    training    AdamW, learning rate 5e-4, decay 0.01, batches of 128, 50,000 steps of which the
                first 5,000 warm up; then a cosine to 0
    data        96,000 expressions for training and 2,000 for the test

What the paper leaves open: one head (so that K = 16 and V = 32), LayerNorm, no dropout, the last
test accuracy, a convolution of 4, and how weights are drawn. `--initialization normal` is that of
MetaLA's language models, normal(0.02) for most; `pytorch` is PyTorch's own for linears and the
embedding, but for MetaLA's queries and gates.

Usage: scripts/reproduce/run.sh lra [--task text --data FOLDER] [--minutes 8]
A run that --minutes cut off goes on when it is started again.

--tiny trains two layers without a convolution on one operator with 4 to 6 digits, once with memory
and once without it (decay 0), where each token is read for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from classifier import Classifier
from experiment import Experiment, Settings
from listops_data import Shape, draw
from lra_data import CLASSES, READERS, VOCABULARY
from models import MODELS, Foreign, Sizes, build, check_models
from torch import nn
from training import Data, Recipe, Result, Run, made_of, train_epochs

from megatron_patch.commands.command_line import (
    CommandError,
    existing_folder,
    one_of,
    run_script,
)

PAPER = dict(
    task=["listops"], model=["metala"], seed=[0], data=None, layers=6, width=32, heads=1, mlp=64,
    kernel_size=4, initialization="normal", lr=5e-4, batch=128, steps=50_000, warm_up=5000,
    decay=0.01, bfloat16=False, examples=96_000, test_examples=2000, depth=10, arguments=10,
    shortest=501, longest=1999,
)  # fmt: skip
TINY = dict(
    model=["metala", "window"], layers=2, kernel_size=1, lr=1e-2, batch=64, steps=800, warm_up=50,
    examples=10_000, test_examples=1024, depth=2, arguments=6, shortest=6, longest=8,
)  # fmt: skip
DRAWN = ("examples", "test_examples", "depth", "arguments", "shortest", "longest")
MARGIN = 0.1  # by which --tiny shall show the effect


def load(case: Settings) -> tuple[Data, Data]:
    """Returns the examples for training and for the test."""
    if case["data"]:
        parts = READERS[case["task"]](Path(case["data"]))
    else:
        examples = case["examples"]
        processes = min(16, os.cpu_count() or 1) if examples > 10_000 else 1
        # One draw for all seeds, as the published files are one.
        tokens, values = draw(made_of(Shape, case), examples + case["test_examples"], 0, processes)
        parts = [(x[:examples], x[examples:]) for x in (tokens, values)]
        parts = zip(*parts, strict=True)
    training, test = (Data((tokens,), labels.long()) for tokens, labels in parts)
    return training, test


def new_model(case: Settings) -> Classifier:
    """Returns a new model."""
    task = case["task"]
    sizes = made_of(Sizes, case, vocabulary=VOCABULARY[task], expand_k=0.5)
    model = Classifier(build(case["model"], sizes), CLASSES[task], pairs=task == "retrieval")
    if case["initialization"] == "pytorch":
        draw_again(model)
    return model


def draw_again(model: nn.Module) -> None:
    """Draws linears and embeddings as PyTorch does, but for MetaLA's queries and gates, and the
    mixers of other libraries."""
    foreign = {id(part) for module in model.modules() if isinstance(module, Foreign)
               for part in module.modules()}  # fmt: skip
    for module in model.modules():
        is_gate = getattr(module, "_is_query_or_gate", False)
        if (
            isinstance(module, nn.Linear | nn.Embedding)
            and not is_gate
            and id(module) not in foreign
        ):
            module.reset_parameters()


def run_case(case: Settings, run: Run) -> Result:
    """Reads or draws the data, and trains by the settings of a run."""
    torch.manual_seed(case["seed"])
    model = new_model(case)
    training, test = load(case)
    recipe = made_of(Recipe, case)
    epochs = max(1, round(case["steps"] * case["batch"] / len(training.labels)))
    found = train_epochs(model, training, test, recipe, run, epochs, case["batch"])
    majority = test.labels.bincount().max().item() / len(test.labels)
    return {**found, "majority": round(majority, 5)}


def check(settings: Settings) -> None:
    """Raises a CommandError for data that are missing or cannot be drawn."""
    tasks, data = settings["task"], settings["data"]
    for task in tasks:
        if data is None and task != "listops":
            raise CommandError(f"--data: found none, wanted the folder of {task}")
    if data is not None and len(tasks) > 1:
        raise CommandError(f"--task: found {', '.join(tasks)}, wanted one beside --data")
    shortest, longest = settings["shortest"], settings["longest"]
    if shortest > longest:
        raise CommandError(
            f"--shortest: found {shortest}, wanted at most --longest, which is {longest}"
        )
    check_models(settings["model"])


def expand(case: Settings) -> Iterator[Settings]:
    """Yields the settings of a run. What is read is not drawn."""
    yield {name: value for name, value in case.items() if not (case["data"] and name in DRAWN)}


def folder(text: str) -> str:
    """Argument type: a folder, absolute."""
    return str(existing_folder(text).resolve())


EXPERIMENT = Experiment(
    "lra", PAPER, TINY, ("task", "model", "seed"), run_case, check=check, expand=expand,
    kinds={"task": one_of(CLASSES), "model": one_of(MODELS), "data": folder,
           "initialization": one_of(("normal", "pytorch"))},
    effect=(lambda found: found["metala"] > found["window"] + MARGIN,
            f"MetaLA ahead by {MARGIN}"),
)  # fmt: skip

if __name__ == "__main__":
    run_script(EXPERIMENT.main)
