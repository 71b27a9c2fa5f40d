"""Training for a number of steps on batches that are drawn as it goes, with a loss curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from training import Step

REPORTS = 20  # lines of progress, and points of the loss curve


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, whose learning rate rises linearly over `warm_up` steps and
    falls by a cosine to a tenth.

    Attributes:
        stop_below: the mean loss at which training ends.
    """

    learning_rate: float
    steps: int
    warm_up: int
    weight_decay: float = 0.1
    stop_below: float = -math.inf

    def learning_rate_of(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def train_steps(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    batch_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    device: torch.device,
    until: float = math.inf,
    title: str = "",
    evaluate: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Trains a model.

    Args:
        model: on `device`.
        loss_of: maps a batch to its loss.
        batch_at: returns the batch of a step, counted from 0. Batches of each shape are captured
            as a CUDA graph of their own.
        until: `time.time()` at which training ends at the latest.
        title: begins the lines of progress.
        evaluate: returns a validation loss, at each line of progress.

    Returns:
        `losses`, the mean loss of each part between two lines; `validation`, the losses that
        `evaluate` found; `at`, the number of steps at each line; `steps`, `seconds`, `parameters`.
        A run whose loss is no longer finite has `diverged`; one that ran out of time is `partial`.
    """
    model.train()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    rate = torch.tensor(schedule.learning_rate, device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=schedule.weight_decay, capturable=on_cuda,
        fused=on_cuda,
    )  # fmt: skip
    by_shape: dict[torch.Size, Step] = {}
    losses: list[float | None] = []
    validation: list[float] = []
    at: list[int] = []
    ending: dict[str, bool] = {}
    every, start, done = max(1, schedule.steps // REPORTS), time.monotonic(), 0
    while done < schedule.steps:
        if time.time() > until:
            ending = {"partial": True}
            break
        rate.fill_(schedule.learning_rate_of(done))
        batch = batch_at(done)
        if batch.shape not in by_shape:
            by_shape[batch.shape] = Step(loss_of, optimizer, device)
        by_shape[batch.shape](batch)
        done += 1
        if on_cuda and done % 64 == 0:  # else the CPU is far ahead, and does not see the time
            torch.cuda.synchronize(device)
        if done % every:
            continue
        loss = sum(step.loss_sum.item() for step in by_shape.values()) / every
        for step in by_shape.values():
            step.loss_sum.zero_()
        at.append(done)
        losses.append(round(loss, 5) if math.isfinite(loss) else None)  # JSON has no NaN
        told = f"{title}step {done}/{schedule.steps}, loss {loss:.4f}"
        if evaluate is not None:
            validation.append(round(evaluate(), 5))
            told += f", validation {validation[-1]:.4f}"
        print(f"{told}, {time.monotonic() - start:.0f} s", flush=True)
        if losses[-1] is None:
            ending = {"diverged": True}
            break
        if loss < schedule.stop_below:
            break
    return {
        **ending,
        "losses": losses,
        "validation": validation,
        "at": at,
        "steps": done,
        "seconds": round(time.monotonic() - start, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
