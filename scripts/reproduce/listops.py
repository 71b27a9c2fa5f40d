#!/usr/bin/env python3
"""ListOps of Long Range Arena (arXiv 2011.04006) with MetaLA and softmax attention.

The model reads an expression of 500 to 2,000 tokens, such as `[MAX 4 3 [MIN 2 3 ] 1 0 ]`, and
tells its value, one of ten. The paper of MetaLA has 59.34 % (S4 59.60, Mamba 38.02), with the
settings that are the defaults here:

    model       depth 6, width 32, queries 16 wide, SwiGLU 64, one direction; a classifier on the
                mean of the last states
    training    AdamW, learning rate 5e-4, decay 0.01, batches of 128, 50,000 steps of which the
                first 5,000 warm up; then a cosine to 0
    data        96,000 expressions for training and 2,000 for the test, drawn by our own generator;
                or the published files: --data FOLDER with basic_train.tsv and basic_test.tsv

What the paper leaves open: one head (so that K = 16 and V = 32), LayerNorm, no dropout, the last
epoch's test accuracy, a convolution of 4.

Usage: scripts/reproduce/run.sh listops [--minutes 8]
A run that --minutes cut off goes on when it is started again: FOLDER/listops-*.pt keeps it.

--tiny trains two layers without a convolution on one operator with 4 to 6 digits, once with memory
and once without it (decay 0), where each token is read for itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from classifier import Classifier, accuracy
from listops_data import PAD, TOKENS, VALUES, Shape, draw, read_tsv
from models import OURS, Sizes, metala_config, prepared
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

PAPER = dict(
    model=["metala"], layers=6, width=32, heads=1, mlp=64, kernel_size=4, lr=5e-4, batch=128,
    epochs=67, warm_up=5000, decay=0.01, examples=96_000, test_examples=2000, depth=10,
    arguments=10, shortest=501, longest=1999, bfloat16=False, seeds=[0],
)  # fmt: skip
TINY = dict(
    model=["metala", "window"], layers=2, width=32, heads=1, mlp=64, kernel_size=1, lr=1e-2,
    batch=64, epochs=10, warm_up=50, decay=0.01, examples=4096, test_examples=1024, depth=2,
    arguments=6, shortest=6, longest=8, bfloat16=False, seeds=[0],
)  # fmt: skip
MARGIN = 0.1  # by which --tiny shall show the effect


def load(case: dict[str, Any]) -> list[torch.Tensor]:
    """Returns tokens uint8 [N, T] and values [N] for training, and those for the test."""
    if case["data"]:
        folder = Path(case["data"])
        parts = [read_tsv(folder / f"basic_{name}.tsv") for name in ("train", "test")]
        longest = max(tokens.shape[1] for tokens, _ in parts)
        return [
            x for tokens, values in parts
            for x in (torch.nn.functional.pad(tokens, (0, longest - tokens.shape[1])), values)
        ]  # fmt: skip
    shape = Shape(case["depth"], case["arguments"], case["shortest"], case["longest"])
    examples = case["examples"]
    processes = min(16, os.cpu_count() or 1) if examples > 10_000 else 1
    # One draw for all seeds, as the published files are one.
    tokens, values = draw(shape, examples + case["test_examples"], 0, processes)
    return [tokens[:examples], values[:examples], tokens[examples:], values[examples:]]


def build(case: dict[str, Any]) -> Classifier:
    """Returns a new model."""
    sizes = Sizes(
        len(TOKENS), case["width"], case["layers"], case["heads"], case["kernel_size"],
        expand_k=0.5,
    )  # fmt: skip
    config = metala_config(case["model"], sizes, intermediate_size=case["mlp"])
    return Classifier(prepared(case["model"], MetaLAModel(config)), VALUES)


def run_case(device: torch.device, folder: Path, case: dict[str, Any], until: float) -> dict:
    """Trains by the settings that `main` makes."""
    torch.manual_seed(case["seed"])
    model = build(case)
    tokens, values, test_tokens, test_values = (part.to(device) for part in load(case))
    values, test_values = values.long(), test_values.long()
    recipe = Recipe(
        case["lr"], case["epochs"], case["batch"], weight_decay=case["decay"],
        warm_up=case["warm_up"], bfloat16=case["bfloat16"], seed=case["seed"],
    )  # fmt: skip

    def logits_of(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        inputs = source[index].long()
        with recipe.autocast(device):
            return model(inputs != PAD, input_ids=inputs)

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(tokens, index), values[index])

    def evaluate() -> float:
        of_test = functools.partial(logits_of, test_tokens)
        return accuracy(model, of_test, test_values, 2 * recipe.batch_size)

    key = zlib.crc32(json.dumps(case, sort_keys=True).encode())
    found = train_epochs(
        model, loss_of, evaluate, len(tokens), recipe, device, until,
        title_of(case, ("model", "lr", "seed")), folder / f"listops-{key:08x}.pt",
    )  # fmt: skip
    majority = test_values.bincount().max().item() / len(test_values)
    return {**found, "majority": round(majority, 5)}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = number(lambda value: value > 0, "above 0")
    parser.add_argument("--model", type=one_of(OURS), nargs="+", help=", ".join(OURS))
    parser.add_argument("--seeds", type=whole(0), nargs="+", metavar="N")
    parser.add_argument("--lr", type=positive, metavar="RATE")
    for name in ("layers", "width", "heads", "mlp", "kernel-size", "batch", "epochs", "warm-up"):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N")
    for name in ("examples", "test-examples", "depth", "arguments", "shortest", "longest"):
        parser.add_argument(f"--{name}", type=whole(1), metavar="N")
    parser.add_argument("--bfloat16", action="store_true", default=None, help="by autocast")
    parser.add_argument("--data", type=existing_folder, metavar="FOLDER", help="published files")
    add_run_arguments(parser)
    args = vars(parser.parse_args())
    tiny, file, device, limits = take_run_arguments(args, "listops")
    given = {name: value for name, value in args.items() if value is not None}
    settings = {"data": None, **(TINY if tiny else PAPER), **given}
    settings["data"] = settings["data"] and str(settings["data"])
    if settings["shortest"] > settings["longest"]:
        parser.error(f"--shortest: found {settings['shortest']}, wanted at most --longest, which "
                     f"is {settings['longest']}")  # fmt: skip
    models, seeds = settings.pop("model"), settings.pop("seeds")
    cases = [dict(model=model, seed=seed, **settings) for model in models for seed in seeds]
    runs = sweep(file, cases, functools.partial(run_case, device, file.parent), **limits)
    if tiny and not given:
        report_effect(runs)
    print(file)


def report_effect(runs: list[dict[str, Any]]) -> None:
    """Prints what memory changes. Raises a CommandError if it is not plain to see."""
    found = {run["settings"]["model"]: run["accuracy"] for run in runs}
    majority = runs[0]["majority"]
    told = f"MetaLA {found['metala']}, without memory {found['window']}, majority {majority}"
    if found["metala"] < max(found["window"], majority) + MARGIN:
        raise CommandError(f"{told}: wanted MetaLA ahead by {MARGIN}")
    print(f"ListOps: {told}.")


if __name__ == "__main__":
    run_script(main)
