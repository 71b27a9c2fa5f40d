"""A training loop for small models.

Such models are bound by kernel launches, not by arithmetic. On CUDA the loop therefore keeps the
data on the device and captures a whole step (gather the batch, forward, backward, AdamW) as one
CUDA graph. On the CPU the same step runs eagerly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from kept import Kept
from torch import nn

from megatron_patch.commands.command_line import CommandError

IGNORED = -100  # the label of a position that is not scored
EAGER_STEPS = 3  # before the capture: kernels compile, and AdamW makes its state
KEEP_EVERY = 30  # seconds between two states that are kept

Result = dict[str, Any]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Data:
    """Examples.

    Attributes:
        inputs: what the model takes, each [N, ...].
        labels: int64 [N] or [N, P], or IGNORED.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor

    def to(self, device: torch.device) -> Data:
        """Returns the examples on a device."""
        return Data(tuple(part.to(device) for part in self.inputs), self.labels.to(device))

    def take(self, index: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Returns the inputs and the labels of an index, int64 [B]."""
        return tuple(part[index] for part in self.inputs), self.labels[index]


def scored(tokens: torch.Tensor, labels: torch.Tensor) -> Data:
    """Returns sequences as examples for a `LanguageModel`.

    Args:
        tokens: int64 [N, T].
        labels: int64 [N, T], what the model shall predict after it has read a position, or IGNORED.

    Returns:
        The tokens with the scored positions, and the labels of these, int64 [N, P]. P is the
        largest number of labels in a row; other rows are filled up with positions whose label is
        IGNORED.
    """
    is_scored = labels != IGNORED
    most = int(is_scored.sum(1).max())
    positions = is_scored.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return Data((tokens, positions), labels.gather(1, positions))


def made_of(kind: Callable[..., Kind], settings: dict[str, Any], **others: Any) -> Kind:
    """Returns a dataclass whose attributes are the settings of their names, and `others`."""
    names = [each.name for each in fields(kind) if each.name in settings]
    return kind(**{name: settings[name] for name in names} | others)


@dataclass(frozen=True)
class Run:
    """Where and how long a run trains.

    Attributes:
        device: of the model and the data.
        until: `time.time()` at which training ends at the latest.
        title: begins the lines of progress.
        kept: what keeps a run that is cut off; `None` for nothing.
    """

    device: torch.device
    until: float = math.inf
    title: str = ""
    kept: Kept | None = None


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW on all parameters, without clipping. The learning rate rises linearly
    over `warm_up` steps and falls by a cosine.

    Attributes:
        lr: the highest learning rate.
        steps: of training. `train_epochs` sets them.
        part: steps between two tests.
        decay: AdamW's weight decay, on all parameters.
        warm_up: steps.
        lowest: the learning rate that the cosine falls to.
        by_part: whether the cosine falls from part to part, as PyTorch's scheduler does that is
            called once an epoch, else from step to step.
        stop_above: the accuracy on the test examples that ends training early.
        stop_below: the mean training loss of a part that ends it early.
        bfloat16: whether products are computed in bfloat16 (autocast), else in float32, which on
            CUDA means TF32.
        seed: of the order of examples.
    """

    lr: float
    decay: float
    steps: int = 0
    part: int = 1
    warm_up: int = 0
    lowest: float = 0.0
    by_part: bool = False
    stop_above: float = math.inf
    stop_below: float = -math.inf
    bfloat16: bool = False
    seed: int = 0

    def learning_rate_of(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = step - step % self.part if self.by_part else step
        progress = max(0, done - self.warm_up) / max(1, self.steps - self.warm_up)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.lowest + cosine * (self.lr - self.lowest)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context of the forward pass. Its cache of weights does not suit a graph."""
        return torch.autocast(
            device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False
        )


class Step:
    """A step of training: called with a tensor of constant shape, it updates the parameters.

    On CUDA the first steps are eager, on a side stream as graphs demand; the next one is captured,
    and from then on replayed.

    Args:
        loss_of: maps the tensor to a loss.
        optimizer: on CUDA `capturable`, its learning rate a tensor.
        loss_sum: the losses are added to it.
    """

    def __init__(
        self,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        loss_sum: torch.Tensor,
    ):
        self.loss_of, self.optimizer, self.loss_sum = loss_of, optimizer, loss_sum
        self.count = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(loss_sum.device) if loss_sum.is_cuda else None

    def __call__(self, batch: torch.Tensor) -> None:
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
                self.batch = batch.clone()
                self.graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(self.graph):
                    self._update(self.batch)
            self.batch.copy_(batch)
            self.graph.replay()

    def _update(self, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(batch)
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of logits [..., C] at the labels [...] that are not IGNORED."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch: int) -> float:
    """Returns the fraction of labels that the model's likeliest classes equal."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=data.labels.device)
    for index in torch.arange(len(data.labels), device=data.labels.device).split(batch):
        inputs, labels = data.take(index)
        right += (model(*inputs).argmax(-1) == labels).sum()
    model.train()
    return int(right) / int((data.labels != IGNORED).sum())


def train_epochs(
    model: nn.Module,
    training: Data,
    test: Data,
    recipe: Recipe,
    run: Run,
    epochs: int,
    batch: int,
    score: Callable[[nn.Module, Data], float] | None = None,
) -> Result:
    """Trains a model that maps examples to logits, in a new order each epoch, and tests it after
    each. The rest that fills no batch is a smaller one.

    Args:
        recipe: its `steps` and `part` are set here.
        score: maps the model and the test examples to their accuracy; by default that of all
            labels alike.

    Returns:
        What `train` does.
    """
    training, test = training.to(run.device), test.to(run.device)
    examples, steps = len(training.labels), math.ceil(len(training.labels) / batch)
    if batch > examples:
        raise CommandError(f"batch: found {batch}, wanted at most the {examples} examples")
    order: dict[int, tuple[torch.Tensor, ...]] = {}  # of the present epoch

    def batch_at(step: int) -> torch.Tensor:
        epoch, place = divmod(step, steps)
        if epoch not in order:
            order.clear()
            generator = torch.Generator().manual_seed(recipe.seed * epochs + epoch)
            shuffled = torch.randperm(examples, generator=generator)
            order[epoch] = shuffled.to(run.device).split(batch)
        return order[epoch][place]

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        inputs, labels = training.take(index)
        with recipe.autocast(run.device):
            logits = model(*inputs)
        return cross_entropy(logits, labels)

    def evaluate() -> float:
        with recipe.autocast(run.device):
            return score(model, test) if score else accuracy(model, test, 4 * batch)

    recipe = replace(recipe, steps=epochs * steps, part=steps)
    return train(model, loss_of, batch_at, recipe, run, evaluate)


def _finite(value: float) -> float | None:
    """Returns a number as JSON can hold it, which has no NaN."""
    return round(value, 5) if math.isfinite(value) else None


def train(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    batch_at: Callable[[int], torch.Tensor],
    recipe: Recipe,
    run: Run,
    evaluate: Callable[[], float] | None = None,
    measure: str = "accuracy",
) -> Result:
    """Trains a model and tests it after each part.

    A run that time cuts off is kept, and goes on there when it is started again: the batch of a
    step depends on nothing but its number. So does a run that was killed, from some seconds before.

    Args:
        model: moved to the device and trained.
        loss_of: maps a batch to its loss.
        batch_at: returns the batch of a step, counted from 0. Batches of each shape are captured as
            a CUDA graph of their own.
        evaluate: returns a number that the test gives.
        measure: the name of that number.

    Returns:
        The last number under its name, with `curve`, the numbers of all tests; `losses`, the mean
        loss of each part; `at`, the steps done at each test; `steps`, `seconds`, `parameters`. A
        run whose loss is no longer finite ends there and has `diverged`; one that ran out of time
        is `partial`.
    """
    device, on_cuda = run.device, run.device.type == "cuda"
    model.to(device).train()
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    # A tensor, since a captured step reads the learning rate where it lies.
    rate = torch.tensor(recipe.lr, device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=recipe.decay, capturable=on_cuda,
        fused=on_cuda,
    )  # fmt: skip
    loss_sum = torch.zeros((), device=device)
    # What is kept beside the weights and the optimizer.
    past: dict[str, Any] = dict(done=0, seconds=0.0, losses=[], curve=[], at=[], ending={})
    kept = run.kept.load(device) if run.kept else None
    if kept is not None:
        model.load_state_dict(kept.pop("model"))
        optimizer.load_state_dict(kept.pop("optimizer"))
        optimizer.param_groups[0]["lr"] = rate
        loss_sum += kept.pop("loss_sum")
        past = kept
        print(f"{run.title}goes on after step {past['done']} of {run.kept.path}", flush=True)
    losses, curve, at, ending = (past[name] for name in ("losses", "curve", "at", "ending"))
    done, start, last_kept = past["done"], time.monotonic() - past["seconds"], time.monotonic()
    by_shape: dict[torch.Size, Step] = {}
    longest_test = 0.0

    def keep() -> None:
        if run.kept is not None:
            run.kept.save(done, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "loss_sum": loss_sum, "done": done, "seconds": time.monotonic() - start,
                "losses": losses, "curve": curve, "at": at, "ending": ending,
            })  # fmt: skip

    is_partial = False
    while not ending:
        if time.time() + longest_test > run.until:
            is_partial = True
            break
        if done == min(recipe.steps, recipe.part * (len(at) + 1)):
            loss = loss_sum.item() / (done - (at[-1] if at else 0))
            loss_sum.zero_()
            at.append(done)
            losses.append(_finite(loss))
            told = f"{run.title}step {done}/{recipe.steps}, loss {loss:.4f}"
            if evaluate is not None:
                began = time.monotonic()
                curve.append(_finite(evaluate()))
                longest_test = max(longest_test, time.monotonic() - began)
                told += f", {measure} {curve[-1]}"
            print(f"{told}, {time.monotonic() - start:.0f} s", flush=True)
            is_learned = measure == "accuracy" and curve and (curve[-1] or 0) > recipe.stop_above
            if losses[-1] is None:
                ending["diverged"] = True
            elif done == recipe.steps or is_learned or loss < recipe.stop_below:
                ending["ended"] = True
            if ending or time.monotonic() - last_kept > KEEP_EVERY:
                keep()
                last_kept = time.monotonic()
            continue
        rate.fill_(recipe.learning_rate_of(done))
        batch = batch_at(done)
        if batch.shape not in by_shape:
            by_shape[batch.shape] = Step(loss_of, optimizer, loss_sum)
        by_shape[batch.shape](batch)
        done += 1
        if on_cuda and done % 64 == 0:  # else the CPU is far ahead, and does not see the time
            torch.cuda.synchronize(device)
    if is_partial:
        keep()
    return {
        **({measure: curve[-1] if curve else None, "curve": curve} if evaluate else {}),
        **({"diverged": True} if "diverged" in ending else {}),
        **({"partial": True} if is_partial else {}),
        "losses": losses,
        "at": at,
        "steps": done,
        "seconds": round(time.monotonic() - start, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
