"""MetaLA's operators on plain tensors."""

from megatron_patch.ops.decoding.token_decoder import token_decoder
from megatron_patch.ops.meta_linear_attention import BACKENDS, meta_linear_attention
from megatron_patch.ops.rms_norm import add_rms_norm
from megatron_patch.ops.short_convolution import short_convolution
from megatron_patch.ops.swiglu import swiglu
from megatron_patch.ops.swiglu_linear import swiglu_linear

__all__ = [
    "BACKENDS",
    "add_rms_norm",
    "meta_linear_attention",
    "short_convolution",
    "swiglu",
    "swiglu_linear",
    "token_decoder",
]
