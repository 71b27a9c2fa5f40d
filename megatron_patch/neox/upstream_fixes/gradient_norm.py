"""Gradient clipping in DeepSpeed's pipelines: the norm counts every parameter of the model once.

DeepSpeed gets three things wrong:

- `clip_grad_norm_`, which clips in float32 without ZeRO, asks for the rank within pipeline and
  tensor parallelism together. So it leaves out the parameters that tensor-parallel ranks hold in
  common (norms, the convolution) on all stages but the first, and counts tied embeddings once for
  each stage that holds them.
- ZeRO's optimizer reduces one norm for each parameter group over all stages, after it has dropped
  groups without parameters. Where one stage has fewer groups than another (because all its
  parameters decay, say), the other waits for ever.
- The bfloat16 optimizer cannot add up the norms of a stage whose only gradients are those of tied
  embeddings, which another stage counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed

from megatron_patch.neox.patching import has_metala_layers, overrides, repairs
from megatron_patch.neox.upstream_fixes.processes import end_run


# deepspeed/runtime/utils.py:394
@repairs(
    "gradient norm without ZeRO",
    "deepspeed.runtime.utils:clip_grad_norm_",
    "get_model_parallel_rank",
)
def clip_each_parameter_once() -> None:
    """Repairs the float32 clipping without ZeRO."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    @overrides(PipelineEngine, "clip_fp32_gradients")
    def clip_each_once(clip, self) -> None:
        if has_metala_layers(self.module.neox_args):
            parameters, max_norm = self.module.parameters(), self.gradient_clipping()
            self._global_grad_norm = clip_gradients(parameters, max_norm, self.grid)
        else:
            clip(self)


# deepspeed/runtime/zero/stage_1_and_2.py:2943, deepspeed/runtime/bf16_optimizer.py:547
@repairs(
    "gradient norm of unequal stages",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm",
    "enumerate(self.bit16_groups)",
)
def reduce_equally_often() -> None:
    """Repairs the norms of ZeRO's and of the bfloat16 optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine

    @overrides(PipelineEngine, "__init__")
    def init_with_equal_groups(init, self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        if self.optimizer and has_metala_layers(self.module.neox_args):
            _reduce_as_often(self.optimizer, self.grid.get_model_parallel_group())
            if isinstance(self.optimizer, BF16_Optimizer):
                _allow_nothing_to_count(self.optimizer)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[torch.nn.Parameter], max_norm: float, grid: Any
) -> torch.Tensor:
    """Scales a stage's gradients so that the norm of the whole model's is at most `max_norm`.
    Returns the norm before scaling, a float32 scalar, equal on all ranks of this model.

    The gradients are already reduced over data-parallel ranks, those of tied embeddings over stages
    too. `grid` is DeepSpeed's `PipelineParallelGrid`.
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
    """Lets every stage reduce as many norms as the stage with the most parameter groups does."""
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
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and groups < most:

        @overrides(optimizer, "scaled_global_norm")
        def scaled_global_norm(own_norm: Callable, norm_type: int = 2) -> torch.Tensor:
            norms = [own_norm(norm_type)]
            for _ in range(most - groups):
                norms.append(optimizer.get_grad_norm_direct([], []))
            return combine_grad_norm_groups(norms, norm_type=norm_type)


def _allow_nothing_to_count(optimizer: Any) -> None:
    """Gives the bfloat16 optimizer a zero to add up where it has no gradient to count."""

    @overrides(optimizer, "get_grads_for_norm")
    def get_grads_for_norm(get_grads: Callable, for_clipping: bool = False) -> Any:
        grads = get_grads(for_clipping)
        if for_clipping or grads[0]:
            return grads
        return [torch.zeros(1, device=torch.cuda.current_device())], grads[1]
