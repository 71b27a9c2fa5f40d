"""Steps that change no weight, because the norm of the gradients is infinite or not a number.

DeepSpeed skips them without a word, in bfloat16 for ever. In float32 without ZeRO it takes them,
and leaves NaN in every weight. In fp16 GPT-NeoX counts them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from megatron_patch.neox.patching import overrides

MOST = 50  # in a row, as in GPT-NeoX's monitor of fp16 runs


class SkippedSteps:
    """Tells of skipped steps, and ends a run that only skips.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.in_a_row = say, 0

    def note(self, iteration: int, is_skipped: bool) -> None:
        """Is called once for each step.

        Raises:
            RuntimeError: too many in a row were skipped.
        """
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if is_skipped:
            self.say(
                f"iteration {iteration} changed no weight: the norm of the gradients is infinite "
                "or not a number"
            )
        if self.in_a_row >= MOST:
            raise RuntimeError(f"MetaLA: {MOST} iterations in a row changed no weight")

    def watch(self, engine: Any) -> None:
        """Notes the steps of a DeepSpeed engine whose optimizer knows at once what it skipped.
        PyTorch's own, which DeepSpeed takes in float32 without ZeRO, are told to skip."""
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            _skip_infinite(engine)

        @overrides(engine, "_take_model_step")
        def take_and_note(take: Callable, *args: Any, **kwargs: Any) -> None:
            take(*args, **kwargs)
            self.note(engine.global_steps, bool(getattr(engine.optimizer, "overflow", False)))


def _skip_infinite(engine: Any) -> None:
    """Lets an engine's optimizer skip a step if a gradient on any rank is infinite or NaN, and say
    so as DeepSpeed's own optimizers do."""
    optimizer = engine.optimizer

    @overrides(optimizer, "step")
    def step_if_finite(step: Callable, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
        is_infinite = (~norms.isfinite()).any().float().to(torch.cuda.current_device())
        distributed.all_reduce(is_infinite, op=distributed.ReduceOp.MAX)
        optimizer.overflow = bool(is_infinite)
        return None if optimizer.overflow else step(*args, **kwargs)
