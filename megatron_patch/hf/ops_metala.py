"""The two operators that the model calls.

A file of its own, so that an exported folder can carry another one of this name: all files beside
this one import nothing but torch, transformers and each other.
"""

from megatron_patch.ops import meta_linear_attention, short_convolution

__all__ = ["meta_linear_attention", "short_convolution"]
