"""The operators that the model calls: those of the package `megatron_patch`, which choose among GPU
kernels.

An exported model folder carries a file of this name that works without the package. It holds the
text of `megatron_patch/ops/torch_ops.py`, the operators in plain PyTorch, and below it this text.
"""

try:
    from megatron_patch.ops import meta_linear_attention, short_convolution, swiglu, token_decoder
except ImportError:  # in an exported folder, where the package is not installed

    def token_decoder(*args: object, **kwargs: object) -> None:
        """Returns `None`: no kernel runs a whole decoding step without the package."""


__all__ = ["meta_linear_attention", "short_convolution", "swiglu", "token_decoder"]
