"""MetaLA's operators as fused Triton kernels for GPUs."""

from megatron_patch.ops.triton.accumulate import accumulate
from megatron_patch.ops.triton.adam import adam_step
from megatron_patch.ops.triton.chunk import meta_linear_attention
from megatron_patch.ops.triton.convolution import short_convolution
from megatron_patch.ops.triton.cross_entropy import cross_entropy
from megatron_patch.ops.triton.rms_norm import add_rms_norm
from megatron_patch.ops.triton.swiglu import swiglu, swiglu_backward

__all__ = [
    "accumulate",
    "adam_step",
    "add_rms_norm",
    "cross_entropy",
    "meta_linear_attention",
    "short_convolution",
    "swiglu",
    "swiglu_backward",
]
