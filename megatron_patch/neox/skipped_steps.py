"""Steps that change no weight, because the norm of the gradients is infinite or not a number.

DeepSpeed skips them without a word, in bfloat16 for ever. In fp16 GPT-NeoX counts them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        """Notes the steps of a DeepSpeed engine whose optimizer knows at once what it skipped."""

        @overrides(engine, "_take_model_step")
        def take_and_note(take: Callable, *args: Any, **kwargs: Any) -> None:
            take(*args, **kwargs)
            self.note(engine.global_steps, bool(getattr(engine.optimizer, "overflow", False)))
