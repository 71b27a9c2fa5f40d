"""The norm by which gradients are clipped in a pipeline: every parameter of the model once.

DeepSpeed's pipelines get three things wrong, each repaired here for models with MetaLA layers:

- `clip_grad_norm_`, which clips without ZeRO in float32, asks for the rank within pipeline and
  tensor parallelism together. So it leaves out what tensor-parallel ranks hold in common (norms,
  the convolution) on all stages but the first, and counts tied embeddings once a stage.
- ZeRO's optimizer reduces one norm a parameter group over all stages, and groups without parameters
  were dropped. Where one stage has fewer groups than another (all its parameters decay, say), the
  other waits for ever.
- The bfloat16 optimizer cannot add up the norms of a stage that has nothing to count, its only
  gradients being those of tied embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from megatron_patch.neox.endings import end_run


def repair_gradient_norm(layer_type: str) -> None:
    """Repairs DeepSpeed's pipelines of models that have layers of this type."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.utils import clip_grad_norm_

    init, clip = PipelineEngine.__init__, PipelineEngine.clip_fp32_gradients
    # A later DeepSpeed that no longer asks for this rank is left alone.
    is_wrong = "get_model_parallel_rank" in clip_grad_norm_.__code__.co_names

    @functools.wraps(init)
    def init_with_equal_groups(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        if self.optimizer and layer_type in self.module.neox_args.attention_config:
            _reduce_as_often(self.optimizer, self.grid.get_model_parallel_group())
            if isinstance(self.optimizer, BF16_Optimizer):
                _allow_nothing_to_count(self.optimizer)

    @functools.wraps(clip)
    def clip_each_once(self) -> None:
        if is_wrong and layer_type in self.module.neox_args.attention_config:
            self._global_grad_norm = clip_gradients(
                self.module.parameters(), self.gradient_clipping(), self.grid
            )
        else:
            clip(self)

    PipelineEngine.__init__ = init_with_equal_groups
    PipelineEngine.clip_fp32_gradients = clip_each_once


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[torch.nn.Parameter], max_norm: float, grid: Any
) -> torch.Tensor:
    """Scales the gradients of a pipeline's stage down to a norm of `max_norm` of the whole model.

    Args:
        parameters: those of this rank, their gradients reduced over data-parallel ranks and tied
            ones over stages.
        grid: DeepSpeed's `PipelineParallelGrid`.

    Returns:
        The norm before, a float32 scalar, equal on all ranks of this model.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter

    parameters = [p for p in parameters if p.grad is not None]
    is_first = grid.get_slice_parallel_rank() == 0
    square = torch.zeros((), device=torch.cuda.current_device())
    for p in parameters:
        is_copy = getattr(p, "ds_pipe_replicated", False)
        if not is_copy and (is_first or is_model_parallel_parameter(p)):
            square += p.grad.float().square().sum()
    distributed.all_reduce(square, group=grid.get_model_parallel_group())
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for p in parameters:
        p.grad.mul_(factor)
    return norm


def _reduce_as_often(optimizer: Any, group: distributed.ProcessGroup) -> None:
    """Lets all stages reduce as many norms as the one with the most parameter groups."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    groups = len(optimizer.param_groups)
    most = torch.tensor([groups, -groups], device=torch.cuda.current_device())
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX, group=group)
    most, least = most[0].item(), -most[1].item()
    if least == 0:
        end_run(
            "pipe_partition_method: found a stage without parameters, wanted some on every stage"
        )
    if most == least:
        return
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        end_run(
            "optimizer.type: found one without a fused kernel in fp16, with parameters that decay "
            "and others on some stages and one kind on others, wanted Adam or ZeRO stage 1"
        )
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and groups < most:
        own_norm = optimizer.scaled_global_norm

        def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
            norms = [own_norm(norm_type)]
            for _ in range(most - groups):
                norms.append(optimizer.get_grad_norm_direct([], []))
            return combine_grad_norm_groups(norms, norm_type=norm_type)

        optimizer.scaled_global_norm = scaled_global_norm


def _allow_nothing_to_count(optimizer: Any) -> None:
    get_grads = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        grads = get_grads(for_clipping)
        if for_clipping or grads[0]:
            return grads
        return [torch.zeros(1, device=torch.cuda.current_device())], grads[1]

    optimizer.get_grads_for_norm = get_grads_for_norm
