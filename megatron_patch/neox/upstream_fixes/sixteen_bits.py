"""bfloat16 without ZeRO and without a pipeline trains as float32 does.

DeepSpeed then keeps the weights in float32 and steps them by its `FP16_Optimizer` (if Adam is its
own fused one) or its `FP16_UnfusedOptimizer` (any other). Three things go wrong:

- PyTorch's fused AdamW is stepped tensor by tensor, because DeepSpeed knows its own Adam alone.
- Both take a step at the start, with gradients of zero, so that the optimizer makes its states. The
  first real step is then Adam's second: the bias correction is that of two steps, the moments hold
  one gradient. With betas of 0.9 and 0.95 the step is 0.74 times as long. The weights also decay
  once too often, at the full learning rate.
- The unfused one clips by a norm to which only the first tensor-parallel rank contributes. It looks
  for the mark of a split tensor on gradients, and only parameters bear it.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_patch.neox.patching import in_metala_runs, overrides, repairs, swapped

UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"


# deepspeed/runtime/engine.py:2562
@repairs(
    "PyTorch's AdamW in bfloat16 without ZeRO",
    "deepspeed.runtime.engine:DeepSpeedEngine._configure_fp16_optimizer",
    "fused_opts = FusedAdam",
)
def step_pytorchs_adamw_as_one() -> None:
    """Lets DeepSpeed keep the weights that PyTorch's AdamW steps in one flat tensor."""
    from deepspeed.runtime import engine
    from megatron.training import setup_model_and_optimizer

    @in_metala_runs(setup_model_and_optimizer)
    def set_up_flat(setup, *args, **kwargs):
        with swapped(engine, "FusedAdam", (engine.FusedAdam, torch.optim.AdamW)):
            return setup(*args, **kwargs)


# deepspeed/runtime/fp16/unfused_optimizer.py:425, fused_optimizer.py:130
@repairs(
    "first step in bfloat16 without ZeRO", f"{UNFUSED}.initialize_optimizer_states", "zer.step()"
)
def take_no_step_at_the_start() -> None:
    """Lets the optimizers make their states in their first real step, as without DeepSpeed."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from megatron.training import setup_model_and_optimizer

    def do_nothing(self) -> None: ...

    name = "initialize_optimizer_states"

    @in_metala_runs(setup_model_and_optimizer)
    def set_up_without_a_step(setup, *args, **kwargs):
        with (
            swapped(FP16_Optimizer, name, do_nothing),
            swapped(FP16_UnfusedOptimizer, name, do_nothing),
        ):
            return setup(*args, **kwargs)


# deepspeed/runtime/fp16/unfused_optimizer.py:397
@repairs("gradient norm in bfloat16 without ZeRO", f"{UNFUSED}.step", "get_weight_norm(grads_for_")
def tell_gradients_apart() -> None:
    """Marks the gradients that tensor-parallel ranks split, as their parameters are marked."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from megatron.training import setup_model_and_optimizer

    @in_metala_runs(setup_model_and_optimizer)
    def set_up_and_mark(setup, *args, **kwargs):
        engine, optimizer, *others = setup(*args, **kwargs)
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            _mark_before_each_step(optimizer)
        return engine, optimizer, *others


def _mark_before_each_step(optimizer: Any) -> None:
    from deepspeed.runtime.utils import is_model_parallel_parameter

    @overrides(optimizer, "step")
    def mark_and_step(step, *args, **kwargs):
        for group in optimizer.fp16_groups:
            for p in group:
                if p.grad is not None:
                    p.grad.model_parallel = is_model_parallel_parameter(p)
        return step(*args, **kwargs)
