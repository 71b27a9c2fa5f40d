"""Values for wandb, TensorBoard and Comet, logged an iteration later than GPT-NeoX does.

GPT-NeoX logs an iteration's loss as soon as the iteration is launched, and so waits until the GPU
has finished it. Here the loss is copied to the host when the GPU gets there, and logged with the
number of its own iteration before the next one logs anything, before a checkpoint is written, or
when training ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_patch.neox.patching import in_metala_runs, replaces


class LateLog:
    """Holds back calls of a function that logs values, in their order.

    Args:
        log: takes a key, a value and more.
    """

    def __init__(self, log: Callable[..., None]):
        self.log = log
        self.calls: list[tuple[tuple, dict]] = []
        self.copied: torch.cuda.Event | None = None

    def __call__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, torch.Tensor):
            is_on_gpu = value.is_cuda
            # To pinned memory, without waiting.
            value = value.detach().to("cpu", non_blocking=True, copy=True)
            if is_on_gpu:
                self.copied = torch.cuda.current_stream().record_event()
        self.calls.append(((key, value, *args), kwargs))

    def flush(self) -> None:
        """Logs what is held back."""
        calls, self.calls = self.calls, []
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        for args, kwargs in calls:
            self.log(*args, **kwargs)


def log_late() -> None:
    """Hooks this module into GPT-NeoX's training."""
    from megatron.checkpointing import save_checkpoint
    from megatron.logging import tb_wandb_log, training_log
    from megatron.training import evaluate_and_print_results, train

    late = LateLog(tb_wandb_log)
    is_late = False

    @replaces(tb_wandb_log)
    def log_in_order(log, *args, **kwargs):
        (late if is_late else log)(*args, **kwargs)

    # wandb takes no step before one that it has, and a run that goes on from a checkpoint does not
    # log again what came before it.
    @in_metala_runs(training_log)
    @in_metala_runs(save_checkpoint)
    def flush_first(log_or_save, *args, **kwargs):
        late.flush()
        return log_or_save(*args, **kwargs)

    @in_metala_runs(evaluate_and_print_results)
    def evaluate_and_flush(evaluate, *args, **kwargs):
        result = evaluate(*args, **kwargs)
        late.flush()  # its losses have been waited for
        return result

    @in_metala_runs(train)
    def train_and_flush(train, neox_args, *args, **kwargs):
        nonlocal is_late
        logs = neox_args.use_wandb, neox_args.tensorboard_writer, neox_args.comet_experiment
        is_late = any(logs)
        try:
            return train(neox_args, *args, **kwargs)
        finally:
            is_late = False
            late.flush()
