"""GPT-NeoX's loss in one pass over the logits, where there is a kernel for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_patch.ops.backends import choose


def fuse_loss(replace: Callable[[Any, Any], None]) -> None:
    """GPT-NeoX copies the logits to float32 and passes over them thirteen times; four bytes more a
    logit are alive at once than the model's own. The kernels read 16-bit logits and compute in
    float32; the gradient overwrites the logits."""
    from megatron import mpu
    from megatron.model.gpt2_model import cross_entropy

    @functools.wraps(cross_entropy)
    def cross_entropy_in_one_pass(output, labels, _fp16=False):
        if _fp16 or choose("cross_entropy", "auto", output.dtype, output.device) != "triton":
            return cross_entropy(output, labels, _fp16=_fp16)
        from megatron_patch.ops.triton.cross_entropy import cross_entropy as fused

        target, mask = labels[0], labels[1].view(-1)
        group = mpu.get_model_parallel_group()
        split = group if mpu.get_model_parallel_world_size() > 1 else None
        losses = fused(output.reshape(-1, output.shape[-1]), target.reshape(-1), split)
        return torch.sum(losses * mask) / mask.sum()

    replace(cross_entropy, cross_entropy_in_one_pass)
