"""Repairs of GPT-NeoX's training loop: learning rate, what it prints, the last checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_patch.neox.patching import in_metala_runs, overrides, repairs, swapped


# megatron/learning_rates.py:68
@repairs(
    "cosine after its end",
    "megatron.learning_rates:AnnealingLR.get_lr",
    "num_iters_ = self.num_iters\n",
)
def stay_at_the_lowest_rate() -> None:
    """Keeps the learning rate at `min_lr` after `lr_decay_iters`, where GPT-NeoX's cosine rises
    again, to `lr` at twice as many iterations."""
    from megatron import training

    @in_metala_runs(training.setup_model_and_optimizer)
    def set_up_with_an_end(setup, neox_args, *args, **kwargs):
        model, optimizer, scheduler, *others = setup(neox_args, *args, **kwargs)
        if scheduler is not None:
            keep_after_the_end(scheduler)
        return model, optimizer, scheduler, *others


def keep_after_the_end(scheduler: Any) -> None:
    """Lets an `AnnealingLR` keep the last rate of its cosine."""

    @overrides(scheduler, "get_lr")
    def get_lr_to_the_end(get_lr: Callable[[], float]) -> float:
        is_over = scheduler.num_iters > scheduler.end_iter
        return scheduler.min_lr if is_over and scheduler.decay_style == "cosine" else get_lr()


class _Iterations(int):
    """Stands for `log_interval` in a run's first report. It is the number of iterations done, by
    which GPT-NeoX divides; and `iteration % it` is 0, so GPT-NeoX reports now."""

    def __rmod__(self, iteration: int) -> int:
        return 0


# megatron/training.py:1266
@repairs(
    "first rate after a start",
    "megatron.training:setup_model_and_optimizer",
    "lr_scheduler.optimizer = model.optimizer",
)
def begin_with_the_rate_of_the_schedule() -> None:
    """Gives the optimizer the schedule's learning rate before a resumed run's first step. With ZeRO
    the optimizer's states are loaded after the schedule and bring the old rate back, so the first
    step did not know of `override_lr_scheduler`."""
    from megatron import training

    @in_metala_runs(training.setup_model_and_optimizer)
    def set_up_with_rate(setup, neox_args, *args, **kwargs):
        model, optimizer, scheduler, *others = setup(neox_args, *args, **kwargs)
        if scheduler is not None:
            scheduler.step(scheduler.num_iters)
        return model, optimizer, scheduler, *others


# megatron/logging.py:414
@repairs(
    "averages after a start",
    "megatron.logging:training_log",
    "elapsed_time / neox_args.log_interval",
)
def average_over_iterations_done() -> None:
    """Divides the sums of a run's first report by the iterations that it did.

    GPT-NeoX divides by `log_interval`. A run that goes on from iteration 13 and reports at 15, with
    `log_interval: 5`, then prints two fifths of its loss, and 2.5 times its speed.
    """
    from megatron import logging, training

    first = [0]  # the iteration that this run began with

    @in_metala_runs(training.train)
    def train_from(train, neox_args, *args, **kwargs):
        first[0] = neox_args.iteration
        return train(neox_args, *args, **kwargs)

    @in_metala_runs(logging.training_log)
    def log_iterations_done(training_log, neox_args, *args, iteration, **kwargs):
        interval, done = neox_args.log_interval, iteration - first[0]
        if iteration % interval == 0 and done < interval:
            interval = _Iterations(done)
        with swapped(neox_args, "log_interval", interval):
            return training_log(neox_args, *args, iteration=iteration, **kwargs)


# megatron/training.py:329
@repairs(
    "last checkpoint written twice",
    "megatron.training:pretrain",
    "if neox_args.save and iteration != 0:",
)
def save_once() -> None:
    """Writes no checkpoint over the same one. GPT-NeoX writes its last one again after the last
    validation, and so does a finished run that is started once more. A run that is killed then has
    damaged a checkpoint that was complete."""
    from megatron.checkpointing import load_checkpoint, save_checkpoint

    # A model remembers the checkpoint that it was loaded from or last written to.
    @in_metala_runs(load_checkpoint)
    def load_and_remember(load_checkpoint, neox_args, model, *args, **kwargs):
        step = load_checkpoint(neox_args, model, *args, **kwargs)
        if not neox_args.finetune:
            model.last_checkpoint = os.path.realpath(neox_args.load), step
        return step

    @in_metala_runs(save_checkpoint)
    def save_new_steps(save_checkpoint, neox_args, iteration, model, *args, **kwargs):
        checkpoint = os.path.realpath(neox_args.save), iteration
        if getattr(model, "last_checkpoint", None) != checkpoint:
            save_checkpoint(neox_args, iteration, model, *args, **kwargs)
            model.last_checkpoint = checkpoint
