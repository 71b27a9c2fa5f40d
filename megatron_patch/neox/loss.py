"""GPT-NeoX's loss in fewer passes over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_patch.neox.context_parallel import mean_over_context
from megatron_patch.neox.patching import replaces
from megatron_patch.ops.backends import choose, function_of


class _CrossEntropy(torch.autograd.Function):
    """-log(softmax(logits)[target]) of each row: [N, V] and int64 [N] to [N].

    The gradient takes the place of the log-probabilities. PyTorch's own cross entropy makes two
    more tensors of their size in the backward pass, one of them for a gradient that is zero but for
    one number a row.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_p, target = logits.log_softmax(-1), target[:, None]
        ctx.save_for_backward(log_p, target)
        return -log_p.gather(1, target)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        log_p, target = ctx.saved_tensors  # a second backward pass ends here with PyTorch's error
        d_loss = d_loss[:, None]
        return log_p.exp_().mul_(d_loss).scatter_add_(1, target, -d_loss), None


def fuse_loss() -> None:
    """Replaces GPT-NeoX's cross entropy, which passes over float32 logits thirteen times.

    On a GPU whose kernels were checked, they read 16-bit logits once, compute in float32, and
    overwrite the logits with their gradient. Elsewhere `_CrossEntropy` serves a vocabulary that is
    not split over tensor-parallel ranks, and GPT-NeoX's own one that is.
    """
    from megatron import mpu
    from megatron.model.gpt2_model import cross_entropy

    @replaces(cross_entropy)
    def cross_entropy_in_few_passes(cross_entropy, output, labels, _fp16=False):
        is_split = mpu.get_model_parallel_world_size() > 1
        has_kernel = choose("cross_entropy", "auto", output.dtype, output.device) == "triton"
        if _fp16:
            return cross_entropy(output, labels, _fp16=True)
        logits = output.reshape(-1, output.shape[-1])
        target, mask = labels[0].reshape(-1), labels[1].view(-1)
        if has_kernel:
            group = mpu.get_model_parallel_group() if is_split else None
            losses = function_of("cross_entropy", "triton")(logits, target, group)
        elif is_split:
            losses = mpu.vocab_parallel_cross_entropy(logits.float().contiguous(), target)
        else:
            losses = _CrossEntropy.apply(logits.float(), target)
        return torch.sum(losses * mask) / mean_over_context(mask.sum())
