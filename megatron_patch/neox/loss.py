"""GPT-NeoX's loss in one pass over the logits, where there is a kernel for it."""

from __future__ import annotations

import functools

import torch

from megatron_patch.neox.patching import replace
from megatron_patch.ops.backends import choose, function_of


def fuse_loss() -> None:
    """Replaces GPT-NeoX's cross entropy on a GPU whose kernels were checked.

    GPT-NeoX copies the logits to float32 and passes over them thirteen times. The kernels read
    16-bit logits once, compute in float32, and overwrite the logits with their gradient.
    """
    from megatron import mpu
    from megatron.model.gpt2_model import cross_entropy

    @functools.wraps(cross_entropy)
    def cross_entropy_in_one_pass(output, labels, _fp16=False):
        backend = choose("cross_entropy", "auto", output.dtype, output.device)
        if _fp16 or backend != "triton":
            return cross_entropy(output, labels, _fp16=_fp16)
        target, mask = labels[0], labels[1].view(-1)
        is_split = mpu.get_model_parallel_world_size() > 1
        losses = function_of("cross_entropy", "triton")(
            output.reshape(-1, output.shape[-1]),
            target.reshape(-1),
            mpu.get_model_parallel_group() if is_split else None,
        )
        return torch.sum(losses * mask) / mask.sum()

    replace(cross_entropy, cross_entropy_in_one_pass)
