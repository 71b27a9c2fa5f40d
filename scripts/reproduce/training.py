"""What the experiments share: a training loop for small models, and a file of results.

Such models are bound by kernel launches, not by arithmetic. On CUDA the loop therefore keeps the
data on the device and captures a whole step (gather the batch, forward, backward, AdamW) as one
CUDA graph. On the CPU the same step runs eagerly.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.commands.command_line import CommandError, device, number, replacing, whole

IGNORED = -100  # the label of a position that is not scored
EAGER_STEPS = 3  # before the capture: kernels compile, and AdamW makes its state
OUTPUT = Path("runs/reproduce")

Settings = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Sequences:
    """Examples of one length.

    Attributes:
        inputs: int64 [N, T], tokens.
        labels: int64 [N, T], what the model shall predict after it has read a position, or IGNORED.
    """

    inputs: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Sequences:
        """Returns the examples on a device."""
        return Sequences(self.inputs.to(device), self.labels.to(device))

    def scored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scored positions and their labels, int64 [N, P]. P is the largest number of
        labels in a row; other rows are filled up with positions whose label is IGNORED."""
        is_scored = self.labels != IGNORED
        most = int(is_scored.sum(1).max())
        positions = is_scored.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        return positions, self.labels.gather(1, positions)


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW on all parameters, without clipping. The learning rate rises linearly
    over `warm_up` steps and falls by a cosine, epoch by epoch.

    Attributes:
        learning_rate: the highest.
        epochs: number of passes over the training examples, in a new order each time. The rest of
            an epoch that fills no batch is left out.
        batch_size: examples in a step.
        weight_decay: AdamW's, on all parameters.
        betas: AdamW's.
        min_learning_rate: what the cosine falls to.
        warm_up: steps.
        stop_at: the accuracy on the test examples that ends training early.
        bfloat16: whether products are computed in bfloat16 (autocast), else in float32, which on
            CUDA means TF32.
        seed: of the order of examples.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    min_learning_rate: float = 0.0
    warm_up: int = 0
    stop_at: float = math.inf
    bfloat16: bool = False
    seed: int = 0

    def learning_rate_of(self, step: int, epoch: int) -> float:
        """Returns the learning rate of a step of an epoch, both counted from 0."""
        cosine = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        rate = self.min_learning_rate + cosine * (self.learning_rate - self.min_learning_rate)
        return rate * min(1.0, (step + 1) / self.warm_up) if self.warm_up else rate

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context of the forward pass. Its cache of weights does not suit a graph."""
        return torch.autocast(
            device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False
        )


class Step:
    """A step of training: called with tensors of constant shapes, it updates the parameters.

    `loss_sum` is the sum of the losses of all steps. On CUDA the first steps are eager, on a side
    stream as graphs demand; the next one is captured, and from then on replayed.

    Args:
        loss_of: maps the tensors to a loss.
        optimizer: on CUDA `capturable`, its learning rate a tensor.
        device: where the parameters and the tensors are.
    """

    def __init__(
        self,
        loss_of: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ):
        self.loss_of, self.optimizer = loss_of, optimizer
        self.loss_sum = torch.zeros((), device=device)
        self.count = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: tuple[torch.Tensor, ...] = ()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *batch: torch.Tensor) -> None:
        self.count += 1
        if self.stream is None:
            self._update(batch)
        elif self.count <= EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._update(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.batch = tuple(part.clone() for part in batch)
                self.graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(self.graph):
                    self._update(self.batch)
            for kept, part in zip(self.batch, batch, strict=True):
                kept.copy_(part)
            self.graph.replay()

    def _update(self, batch: tuple[torch.Tensor, ...]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(*batch)
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of logits [..., C] at the labels [...] that are not IGNORED."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: nn.Module, data: Sequences, batch_size: int) -> float:
    """Returns the fraction of labels that the model's likeliest tokens equal."""
    model.eval()
    positions, labels = data.scored()
    right = torch.zeros((), dtype=torch.int64, device=labels.device)
    batches = (part.split(batch_size) for part in (data.inputs, positions, labels))
    for inputs, places, wanted in zip(*batches, strict=True):
        right += (model(inputs, places).argmax(-1) == wanted).sum()
    model.train()
    return int(right) / int((labels != IGNORED).sum())


def train(
    model: nn.Module,
    training: Sequences,
    test: Sequences,
    recipe: Recipe,
    device: torch.device,
    until: float = math.inf,
    title: str = "",
    checkpoint: Path | None = None,
    score: Callable[[nn.Module, Sequences], float] | None = None,
) -> Result:
    """Trains a model on sequences and tests it after each epoch, as `train_epochs` tells.

    The model maps tokens [B, T] and positions [B, P] to logits [B, P, vocabulary]. `score` maps it
    and the test examples to their accuracy; by default that of all labels alike.
    """
    score = score or functools.partial(accuracy, batch_size=4 * recipe.batch_size)
    training, test = training.to(device), test.to(device)
    positions, labels = training.scored()

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        with recipe.autocast(device):
            logits = model(training.inputs[index], positions[index])
        return cross_entropy(logits, labels[index])

    def evaluate() -> float:
        with recipe.autocast(device):
            return score(model, test)

    examples = len(training.inputs)
    return train_epochs(
        model, loss_of, evaluate, examples, recipe, device, until, title, checkpoint
    )


def train_epochs(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    evaluate: Callable[[], float],
    examples: int,
    recipe: Recipe,
    device: torch.device,
    until: float = math.inf,
    title: str = "",
    checkpoint: Path | None = None,
) -> Result:
    """Trains a model and tests it after each epoch.

    Args:
        model: moved to `device` and trained.
        loss_of: maps the indices of a batch, int64 [B] on `device`, to its loss.
        evaluate: returns the accuracy on the test examples.
        examples: number of training examples.
        until: `time.time()` at which training ends at the latest, in the middle of an epoch.
        title: begins the lines that tell how training goes.
        checkpoint: a file that keeps the run after each epoch. A run that time cut off goes on
            there; one that has ended removes it. `None` keeps nothing.

    Returns:
        `accuracy` of the last epoch, `best_accuracy`, `accuracies` and `losses` of all epochs,
        `steps`, `seconds`, `parameters`. A run whose loss is no longer finite ends there and has
        `diverged`; one that ran out of time is `partial`.
    """
    torch.manual_seed(recipe.seed)
    model.to(device).train()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    # A tensor, since a captured step reads the learning rate where it lies.
    rate = torch.tensor(recipe.learning_rate, device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        capturable=on_cuda,
        fused=on_cuda,
    )
    step = Step(loss_of, optimizer, device)
    steps = examples // recipe.batch_size
    if not steps:
        raise CommandError(f"batch of {recipe.batch_size}: found only {examples} examples")
    accuracies: list[float] = []
    losses: list[float | None] = []
    ending: Result = {}
    steps_before, seconds_before = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        optimizer.param_groups[0]["lr"] = rate
        accuracies, losses = kept["accuracies"], kept["losses"]
        steps_before, seconds_before = kept["steps"], kept["seconds"]
        print(f"{title}goes on after epoch {len(losses)} of {checkpoint}", flush=True)
    start = time.monotonic() - seconds_before
    for epoch in range(len(losses), recipe.epochs):
        torch.manual_seed(recipe.seed * recipe.epochs + epoch)  # the order of an epoch
        step.loss_sum.zero_()
        order = torch.randperm(examples, device=device)[: steps * recipe.batch_size]
        for count, index in enumerate(order.split(recipe.batch_size)):
            if time.time() > until:
                break
            done = steps_before + step.count
            if count == 0 or done < recipe.warm_up:
                rate.fill_(recipe.learning_rate_of(done, epoch))
            step(index)
            # The CPU is far ahead of the GPU otherwise, and does not see that time is up.
            if on_cuda and count % 64 == 0:
                torch.cuda.synchronize(device)
        if time.time() > until:
            ending = {"partial": True}
            break
        loss = step.loss_sum.item() / steps
        losses.append(round(loss, 5) if math.isfinite(loss) else None)  # JSON has no NaN
        accuracies.append(round(evaluate(), 5))
        seconds = time.monotonic() - start
        told = f"epoch {epoch + 1}/{recipe.epochs}, loss {loss:.4f}, accuracy {accuracies[-1]:.4f}"
        print(f"{title}{told}, {seconds:.0f} s", flush=True)
        if losses[-1] is None:
            ending = {"diverged": True}
            break
        if accuracies[-1] >= recipe.stop_at:
            break
        if checkpoint is not None:
            kept = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "accuracies": accuracies,
                "losses": losses,
                "steps": steps_before + step.count,
                "seconds": seconds,
            }
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with replacing(checkpoint) as new:
                torch.save(kept, new)
    if checkpoint is not None and not ending.get("partial"):
        checkpoint.unlink(missing_ok=True)
    return {
        "accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        **ending,
        "accuracies": accuracies,
        "losses": losses,
        "steps": steps_before + step.count,
        "seconds": round(time.monotonic() - start, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def read_runs(path: Path) -> list[Result]:
    """Returns the runs in a file of results, a JSON object a line; none without a file."""
    runs = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for count, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            run["settings"]
        except (ValueError, KeyError, TypeError):
            raise CommandError(f"{path}:{count}: wanted a run as a line of JSON") from None
        runs.append(run)
    return runs


def sweep(
    path: Path,
    cases: Iterable[Settings],
    run: Callable[[Settings, float], Result],
    jobs: int = 1,
    minutes: float = math.inf,
) -> list[Result]:
    """Runs the cases that a file of results lacks, and returns the finished runs of all cases.

    A run is appended as one line when it ends, so a sweep that was interrupted goes on where it
    was. One that time cut off is kept as `partial` and is run again next time.

    Args:
        path: the file; its folder is made.
        cases: settings, in values that JSON can hold.
        run: trains by settings until a `time.time()`, and returns what shall be kept. It is a
            function of a module, or a `functools.partial` of one, since processes must find it.
        jobs: number of processes side by side, over all GPUs that there are. 1 starts none.
        minutes: the time after which no run goes on.
    """
    cases = [json.loads(json.dumps(case)) for case in cases]
    until = time.time() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [old for old in read_runs(path) if not old.get("partial")]
    finished = {index: old for index, case in enumerate(cases) for old in known
                if old["settings"] == case}  # fmt: skip
    missing = [index for index in range(len(cases)) if index not in finished]
    print(f"{path}: {len(finished)} of {len(cases)} runs are there", flush=True)
    work = functools.partial(_run_one, run, until)
    for index, result in _results(work, [(index, cases[index]) for index in missing], jobs):
        if result is None:
            continue
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, allow_nan=False) + "\n")
        if not result.get("partial"):
            finished[index] = result
    return [finished[index] for index in sorted(finished)]


def _run_one(
    run: Callable[[Settings, float], Result], until: float, case: Settings
) -> Result | None:
    """Returns a run with its settings and provenance; `None` where no time is left to begin it."""
    if time.time() > until:
        return None
    return {"settings": case, **run(case, until), **provenance()}


def _results(
    work: Callable[[Settings], Result | None], cases: list[tuple[int, Settings]], jobs: int
) -> Iterator[tuple[int, Result | None]]:
    """Yields the index and the result of each case as it ends."""
    if jobs == 1 or len(cases) < 2:
        for index, case in cases:
            yield index, work(case)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    counter = context.Value("i", 0)
    workers = min(jobs, len(cases))
    with ProcessPoolExecutor(workers, context, _take_device, (counter,)) as pool:
        futures: dict[Future, int] = {pool.submit(work, case): index for index, case in cases}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take_device(counter: Any) -> None:
    """Spreads processes over the GPUs. "cuda" without a number is then another one for each."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def title_of(case: Settings, names: Iterable[str]) -> str:
    """Returns the named settings of a run as the beginning of its lines of progress."""
    return ", ".join(f"{name} {case[name]}" for name in names) + ": "


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all experiments have: where, how long, how many at once."""
    positive = number(lambda value: value > 0, "above 0")
    parser.add_argument("--tiny", action="store_true", help="under a minute on a CPU")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"by default {OUTPUT}")
    parser.add_argument("--device", type=device, help="by default CUDA where it is")
    parser.add_argument("--jobs", type=whole(1), default=1, metavar="N", help="runs side by side")
    parser.add_argument(
        "--minutes", type=positive, default=math.inf, metavar="N",
        help="ends runs after this time; what was not finished is run next time",
    )  # fmt: skip


def take_run_arguments(args: dict[str, Any], name: str) -> tuple[bool, Path, torch.device, dict]:
    """Removes the arguments of `add_run_arguments` from the parsed ones.

    Returns `tiny`, the file of results, the device, and the keywords `jobs` and `minutes` of
    `sweep`.
    """
    tiny = args.pop("tiny")
    folder = args.pop("output") or (OUTPUT / "tiny" if tiny else OUTPUT)
    found = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    where = torch.device(args.pop("device") or found)
    limits = {"jobs": args.pop("jobs"), "minutes": args.pop("minutes")}
    return tiny, folder / f"{name}.jsonl", where, limits


@functools.cache
def provenance() -> dict[str, str]:
    """Returns the command, the device, the date, the commit and PyTorch's version of a run."""
    root = Path(__file__).resolve().parents[2]
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True)
        commit = found.stdout.strip() if found.returncode == 0 else "unknown"
    except OSError:  # no git
        commit = "unknown"
    on_cuda = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *sys.argv]),
        "card": torch.cuda.get_device_name() if on_cuda else f"CPU ({platform.machine()})",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit,
        "torch": torch.__version__,
    }
