#!/usr/bin/env python3
"""One needle in a haystack (RULER's S-NIAH-1, arXiv 2404.06654) in a small form: trained at up to
8k tokens, tested at 1k to 64k, with MetaLA, a hybrid, and softmax attention.

The paper's weak spot: 8.5 % where softmax attention of equal size has 56.4 (0.4B, language models).
Here models of some 3 million parameters learn the task alone:

    haystack    one sentence of noise over and over, as in S-NIAH-1; or random words (--haystack
                random), in which there is more to forget
    needle      MARK and --digits digits, written over the haystack at a random place
    question    at the end: QUERY, then the digits, each of which is predicted
    training    sequences of all --lengths in turn, as many tokens in each step; new ones in each.
                Short ones are among them because a new softmax attends to all tokens alike: in
                1,024 tokens the needle weighs too little to be found, in 64 it is learned at once.
                The needle's distance from the end is drawn on a logarithmic scale, because a new
                MetaLA forgets within some 20 tokens (its decay is 2^(-1/16)) and learns nothing
                from needles far away. It ends when the loss is below 0.01
    test        --test-examples a length; right is who has all digits right
    models      "metala"; "hybrid", each fourth layer softmax attention without positions; "softmax"
                with rotary positions, which nobody stretches here

Usage: scripts/reproduce/run.sh needle [--model metala hybrid softmax] [--minutes 8]

--tiny trains one layer (the hybrid: two) at 16 and 32 tokens: MetaLA and the hybrid find the
needle, MetaLA without memory (its decay is 0) does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from experiment import Experiment, Settings
from models import MODELS, LanguageModel, Sizes, build, check_models
from training import Recipe, Result, Run, cross_entropy, made_of, train

from megatron_patch.commands.command_line import CommandError, one_of, run_script

MARK, QUERY, FIRST_DIGIT, FIRST_WORD = 0, 1, 2, 12
SENTENCE = 24  # words and full stops of RULER's noise
WORDS = 52
VOCABULARY = FIRST_WORD + WORDS
USUAL = dict(
    seed=[0], model=["metala", "hybrid", "softmax"], width=256, layers=4, heads=4, kernel_size=4,
    lr=1e-3, steps=6000, warm_up=200, tokens=65_536,
    lengths=[64, 128, 256, 512, 1024, 2048, 4096, 8192],
    test_lengths=[1024, 2048, 4096, 8192, 16_384, 32_768, 65_536], test_examples=200, digits=7,
    haystack="repeated", bfloat16=True,
)  # fmt: skip
TINY = dict(
    model=["metala", "hybrid", "window"], width=64, layers=1, heads=2, lr=1e-2, steps=300,
    warm_up=20, tokens=2048, lengths=[16, 32], test_lengths=[32], digits=1, bfloat16=False,
)  # fmt: skip
LEARNED = 0.01  # the mean loss at which training ends


@dataclass(frozen=True)
class Needle:
    """The task.

    Attributes:
        digits: of the needle.
        repeated: whether the haystack is one sentence over and over, or random words.
    """

    digits: int
    repeated: bool

    def draw(
        self, examples: int, length: int, generator: torch.Generator, nearer: bool = False
    ) -> torch.Tensor:
        """Returns int64 [examples, length] on the generator's device. The last `digits` tokens are
        the answer; the model reads all but the last one.

        Args:
            nearer: whether the logarithm of the needle's distance from the end is uniform, else its
                place is.
        """
        device, digits = generator.device, self.digits

        def random(*shape: int, below: int) -> torch.Tensor:
            return torch.randint(below, shape, generator=generator, device=device)

        if self.repeated:
            words = (torch.arange(length, device=device) % SENTENCE).expand(examples, -1)
        else:
            words = random(examples, length, below=WORDS)
        tokens = FIRST_WORD + words.clone()
        answer = FIRST_DIGIT + random(examples, digits, below=10)
        mark = torch.full((examples, 1), MARK, device=device)
        free = length - 2 * (digits + 1)  # the largest place
        places = random(examples, 1, below=free + 1)
        if nearer:
            drawn = torch.rand(examples, 1, generator=generator, device=device)
            places = (free + 1 - ((free + 2) ** drawn).long()).clamp(min=0)
        places = places + torch.arange(digits + 1, device=device)
        tokens.scatter_(1, places, torch.cat([mark, answer], 1))
        tokens[:, -digits - 1] = QUERY
        tokens[:, -digits:] = answer
        return tokens


def scored(tokens: torch.Tensor, digits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the model's inputs [B, T], the positions of the predictions, and the answers, both
    [B, digits]."""
    positions = torch.arange(
        tokens.shape[1] - digits - 1, tokens.shape[1] - 1, device=tokens.device
    )
    return tokens[:, :-1], positions.expand(len(tokens), -1), tokens[:, -digits:]


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, task: Needle, length: int, examples: int, tokens: int,
    generator: torch.Generator,
) -> float:  # fmt: skip
    """Returns the fraction of `examples` new sequences whose digits are all the likeliest, read in
    batches of about `tokens` tokens."""
    model.eval()
    right, batch = 0, max(1, tokens // length)
    for start in range(0, examples, batch):
        drawn = task.draw(min(batch, examples - start), length, generator)
        inputs, positions, answer = scored(drawn, task.digits)
        right += int((model(inputs, positions).argmax(-1) == answer).all(1).sum())
    model.train()
    return right / examples


def run_case(case: Settings, run: Run) -> Result:
    """Trains by the settings of a run, and tests at all lengths."""
    torch.manual_seed(case["seed"])
    sizes = made_of(Sizes, case, vocabulary=VOCABULARY, expand_k=0.5)
    model = LanguageModel(build(case["model"], sizes))
    task = Needle(case["digits"], case["haystack"] == "repeated")
    generator = torch.Generator(run.device)
    lengths, tokens = case["lengths"], case["tokens"]
    recipe = made_of(
        Recipe, case, decay=0.1, part=max(1, case["steps"] // 20), lowest=case["lr"] / 10,
        stop_below=LEARNED,
    )  # fmt: skip

    def batch_at(step: int) -> torch.Tensor:
        length = lengths[step % len(lengths)]
        generator.manual_seed(case["seed"] * case["steps"] + step)
        return task.draw(max(1, tokens // length), length, generator, nearer=True)

    def loss_of(sequences: torch.Tensor) -> torch.Tensor:
        inputs, positions, answer = scored(sequences, task.digits)
        with recipe.autocast(run.device):
            logits = model(inputs, positions)
        return cross_entropy(logits, answer)

    found = train(model, loss_of, batch_at, recipe, run)
    accuracies: dict[str, float] = {}
    for length in case["test_lengths"]:
        if found.get("partial") or time.time() > run.until:
            return {"accuracy": None, "accuracies": accuracies, **found, "partial": True}
        generator.manual_seed(2**40 + case["seed"])  # no step of training has this seed
        with recipe.autocast(run.device):
            accuracies[str(length)] = accuracy(
                model, task, length, case["test_examples"], 2 * tokens, generator
            )
        print(f"{run.title}{length} tokens: {accuracies[str(length)]:.3f}", flush=True)
    last = accuracies[str(case["test_lengths"][-1])]
    return {"accuracy": last, "accuracies": accuracies, **found}


def check(settings: Settings) -> None:
    """Raises a CommandError for a needle that does not fit, or a model that is not here."""
    shortest, digits = min(settings["lengths"] + settings["test_lengths"]), settings["digits"]
    if shortest < 2 * (digits + 1):
        raise CommandError(
            f"--digits: found {digits}, wanted a needle and an answer that fit into {shortest} "
            "tokens"
        )
    check_models(settings["model"])


def expand(case: Settings) -> Iterator[Settings]:
    """Yields the settings of a run. A hybrid has at least two layers."""
    yield case | dict(layers=max(case["layers"], 2 if case["model"] == "hybrid" else 1))


EXPERIMENT = Experiment(
    "needle", USUAL, TINY, ("seed", "model"), run_case, check=check, expand=expand,
    kinds={"model": one_of(MODELS), "haystack": one_of(("repeated", "random"))},
    effect=(lambda found: min(found["metala"], found["hybrid"]) > 0.9 and found["window"] < 0.4,
            "above 0.9 with memory, and below 0.4 without it"),
)  # fmt: skip

if __name__ == "__main__":
    run_script(EXPERIMENT.main)
