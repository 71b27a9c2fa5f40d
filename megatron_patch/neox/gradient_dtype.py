"""Gradients in bfloat16 where nothing is added to them.

`data_types: {grad_accum_dtype: fp32}` makes DeepSpeed keep float32 sums of bfloat16 gradients, over
micro-batches. With one micro-batch a step each sum is one gradient, cast. It has the same value in
bfloat16, in half the memory, and its average over data-parallel ranks, which DeepSpeed sends in
bfloat16, needs no casts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from megatron_patch.neox.optimizer_step import is_adamw
from megatron_patch.neox.patching import swapped


@contextlib.contextmanager
def single_gradients_in_bfloat16(neox_args: Any) -> Iterator[None]:
    """Lets a `BF16_Optimizer` that DeepSpeed makes inside keep gradients in bfloat16, where that
    changes no bit."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    init = BF16_Optimizer.__init__

    @functools.wraps(init)
    def init_in_bfloat16(self, adam, *args, dp_process_group=None, has_moe_layers=False, **others):
        ranks = distributed.get_world_size(dp_process_group)
        if is_adamw(adam) and not has_moe_layers and are_single(neox_args, ranks):
            others["grad_acc_dtype"] = torch.bfloat16
        groups = dict(dp_process_group=dp_process_group, has_moe_layers=has_moe_layers)
        init(self, adam, *args, **groups, **others)

    with swapped(BF16_Optimizer, "__init__", init_in_bfloat16):
        yield


def are_single(neox_args: Any, ranks: int) -> bool:
    """Returns whether gradients of a bfloat16 run can be kept in bfloat16 with equal bits.

    Args:
        ranks: over which gradients are averaged. Division by a power of two is exact.
    """
    is_power_of_two = ranks & (ranks - 1) == 0
    # `fp32_allreduce` is "fp32" here.
    averaged_in = (neox_args.deepspeed_extra_args or {}).get("communication_data_type")
    return (
        neox_args.gradient_accumulation_steps == 1
        and neox_args.pipe_parallel_size <= 1  # stages add up the gradients of tied embeddings
        and is_power_of_two
        and neox_args.gradient_predivide_factor == 1
        and averaged_in in (None, "bf16")
    )
