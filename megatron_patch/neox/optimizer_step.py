"""The step of DeepSpeed's bfloat16 optimizer, for which the host does not wait.

DeepSpeed reads the norm of the gradients on the host, to clip them and to skip the step where the
norm is infinite or NaN. Until it has the norm the host launches nothing, and afterwards the GPU
waits for the host. Here a factor on the GPU decides both. The kernel that updates the weights
multiplies the gradients by it, and changes nothing where it is 0. The host learns of a skipped step
before it launches the next update, and corrects what it counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_patch.neox.patching import overrides
from megatron_patch.neox.skipped_steps import SkippedSteps
from megatron_patch.ops.backends import implementation


class OptimizerStep:
    """Steps of a DeepSpeed engine with a `BF16_Optimizer` of AdamW.

    Args:
        engine: its `optimizer.step` and `save_checkpoint` are replaced, and it gets `settle`, to be
            called after the last step.
        skipped: is told of each step, an iteration later.
    """

    def __init__(self, engine: Any, skipped: SkippedSteps):
        self.engine, self.optimizer, self.skipped = engine, engine.optimizer, skipped
        self.adam = engine.optimizer.optimizer
        device = self.optimizer.fp32_groups_flat_partition[0].device
        is_on_gpu = device.type == "cuda"
        self.factor = torch.ones((), pin_memory=is_on_gpu)  # of the last step, on the host
        self.arrived = torch.cuda.Event() if is_on_gpu else None
        self.is_known = True
        self.optimizer.step, engine.settle = self.step, self.settle

        @overrides(engine, "save_checkpoint")
        def save_what_is_known(save: Callable, *args: Any, **kwargs: Any) -> Any:
            self.settle()
            return save(*args, **kwargs)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the weights with the sums of gradients."""
        from deepspeed.runtime.bf16_optimizer import all_gather_dp_groups

        self.settle()
        optimizer = self.optimizer
        optimizer.overflow = False
        norm = global_norm(optimizer)
        optimizer._global_grad_norm = norm
        limit = optimizer.clip_grad if optimizer.clip_grad > 0 else torch.inf
        factor = torch.where(norm.isfinite(), (limit / (norm + 1e-6)).clamp(max=1), 0)
        for index in range(len(self.adam.param_groups)):
            self._update(index, factor)
        all_gather_dp_groups(
            groups_flat=optimizer.bf16_groups_flat,
            partitioned_param_groups=optimizer.bf16_partitioned_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.clear_hp_grads()
        self.factor.copy_(factor, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()
        self.is_known = False

    def _update(self, index: int, factor: Tensor) -> None:
        """Updates this rank's part of a parameter group, and its copy in bfloat16."""
        optimizer, group = self.optimizer, self.adam.param_groups[index]
        parameter = optimizer.fp32_groups_flat_partition[index]
        rank = distributed.get_rank(optimizer.real_dp_process_group[index])
        state = self.adam.state[parameter]
        if not state:
            state["step"] = torch.zeros(()) if isinstance(self.adam, torch.optim.AdamW) else 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if isinstance(state["step"], Tensor):
            state["step"] = state["step"].cpu()  # AdamW puts those of a checkpoint on the GPU
        state["step"] += 1
        betas = tuple(map(float, group["betas"]))
        corrections = (1.0, 1.0)
        if group.get("bias_correction", True):
            corrections = tuple(1 - beta ** int(state["step"]) for beta in betas)
        implementation("adam_step", "auto", torch.float32, parameter.device)(
            parameter,
            optimizer.bf16_partitioned_groups[index][rank],
            optimizer.fp32_groups_gradient_flat_partition[index],
            state["exp_avg"],
            state["exp_avg_sq"],
            factor,
            float(group["lr"]),
            betas,
            float(group["eps"]),
            float(group["weight_decay"]),
            corrections,
        )

    def settle(self) -> None:
        """Takes back what was counted of the last step if it was skipped."""
        if self.is_known:
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        self.is_known, is_skipped = True, self.factor.item() == 0
        engine, scheduler = self.engine, self.engine.lr_scheduler
        if is_skipped:
            for state in self.adam.state.values():
                state["step"] -= 1
            engine.skipped_steps += 1
            if scheduler is not None:
                scheduler.step(scheduler.num_iters - 1)
        self.skipped.note(engine.global_steps, is_skipped)


def is_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer is AdamW for all its parameters."""
    from deepspeed.ops.adam import FusedAdam

    if isinstance(optimizer, torch.optim.AdamW):
        return not any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups)
    return type(optimizer) is FusedAdam and bool(optimizer.adam_w_mode)


def global_norm(optimizer: Any) -> Tensor:
    """Returns the norm of all gradients of a model, float32 [], equal on all ranks. The optimizer
    says which of them this rank counts."""
    gradients = [gradient.detach() for gradient in optimizer.get_grads_for_norm()[0]]
    square = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square().sum()
    if optimizer.mpu is not None:
        group = optimizer.mpu.get_model_parallel_group()
        distributed.all_reduce(square, group=group)
    return square.sqrt()
