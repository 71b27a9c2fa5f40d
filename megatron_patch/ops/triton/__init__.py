"""The MetaLA operator as fused Triton kernels, for GPUs."""

from megatron_patch.ops.triton.configuration import is_checked
from megatron_patch.ops.triton.operator import meta_linear_attention

__all__ = ["is_checked", "meta_linear_attention"]
