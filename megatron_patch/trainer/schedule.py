"""Computes the learning rate of each step, and checks that a resumed run keeps its schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_patch.architecture import refuse
from megatron_patch.trainer.settings import TrainerSettings


@dataclass
class Schedule:
    """GPT-NeoX's `AnnealingLR`, as a run with MetaLA layers has it, as a function of the step.
    Checkpoints hold its fields: `LambdaLR` saves the attributes of a callable object, and restores
    them when it is loaded."""

    lr: float
    min_lr: float
    warmup_iters: float
    decay_iters: int
    lr_decay_style: str

    @classmethod
    def from_settings(cls, settings: TrainerSettings) -> Schedule:
        return cls(
            lr=settings.optimizer.params.lr,
            min_lr=settings.min_lr,
            warmup_iters=settings.warmup * settings.decay_iters,
            decay_iters=settings.decay_iters,
            lr_decay_style=settings.lr_decay_style,
        )

    def __call__(self, step: int) -> float:
        """Returns the learning rate after `step` steps, as a fraction of `lr`."""
        if self.warmup_iters > 0 and step <= self.warmup_iters:
            return max(1, step) / self.warmup_iters
        lowest = self.min_lr / self.lr
        if self.lr_decay_style == "constant":
            return max(1.0, lowest)
        progress = (step - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        if self.lr_decay_style == "cosine":
            factor = lowest + (1 - lowest) / 2 * (math.cos(math.pi * min(progress, 1)) + 1)
        elif self.lr_decay_style == "linear":
            factor = 1 - progress
        else:
            factor = math.exp(-0.693 * progress)
        return max(factor, lowest)


class ResumableLR(torch.optim.lr_scheduler.LambdaLR):
    """A PyTorch scheduler with a `Schedule`. With `override`, a loaded scheduler goes on from its
    step with the schedule of this run's settings."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, override: bool):
        self.override = override
        super().__init__(optimizer, schedule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.override:
            return super().load_state_dict(state_dict)
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        for group, base, lr in zip(
            self.optimizer.param_groups, self.base_lrs, self.get_lr(), strict=True
        ):
            group["initial_lr"], group["lr"] = base, lr


def check_schedule(settings: TrainerSettings, checkpoint: Path) -> None:
    """Checks that a resumed run has the optimizer and the schedule of its checkpoint, because the
    Trainer silently takes both from there. Raises a SettingsError that names the setting, what was
    found and what the checkpoint has."""

    params = settings.optimizer.params
    states = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True)
    for group in states["param_groups"]:
        for name, wanted in (("betas", params.betas), ("eps", params.eps)):
            if group[name] != wanted:
                refuse(f"optimizer.params.{name}", wanted, f"{group[name]!r} as in {checkpoint}")
    decays = {group["weight_decay"] for group in states["param_groups"]}
    if decays != {settings.weight_decay, 0.0}:
        refuse("weight_decay", settings.weight_decay, f"{max(decays)!r} as in {checkpoint}")
    if settings.use_checkpoint_lr_scheduler or settings.override_lr_scheduler:
        return
    states = torch.load(checkpoint / "scheduler.pt", map_location="cpu", weights_only=True)
    saved = states["lr_lambdas"][0]
    remedy = (
        "; override_lr_scheduler: true takes this run's settings, use_checkpoint_lr_scheduler: "
        "true the checkpoint's"
    )
    for name, wanted in asdict(Schedule.from_settings(settings)).items():
        if (found := (saved or {}).get(name)) != wanted:
            refuse(name, wanted, f"{found!r} as in {checkpoint}{remedy}")
