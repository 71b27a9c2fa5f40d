"""The operators that the model calls.

A file of its own, because an exported folder carries another one of this name, which works without
this package: the model's other files import nothing but torch, transformers and each other.
"""

from megatron_patch.ops import meta_linear_attention, short_convolution, swiglu, token_decoder

__all__ = ["meta_linear_attention", "short_convolution", "swiglu", "token_decoder"]
