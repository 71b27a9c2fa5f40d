"""The operators' file of an exported model folder, before `remote_code.py` makes it self-contained.

In the folder, the first imports from `megatron_patch.ops` are replaced by the definitions that they
name, with all that those use; the rest of this file stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_patch.ops.checks import without_autocast
from megatron_patch.ops.chunked import meta_linear_attention
from megatron_patch.ops.epilogue import give_state
from megatron_patch.ops.short_convolution import _convolve, _convolve_packed

_chunked = meta_linear_attention


def meta_linear_attention(
    q: torch.Tensor, *tensors: torch.Tensor | None, **settings: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator above in its own precision, of which autocast would halve that of products."""
    with without_autocast(q.device):
        return _chunked(q, *tensors, **settings)


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal depthwise convolution of x [B, T, D] with weight [D, 1, W] along time, and SiLU.

    The state [N, D, W - 1] holds the last inputs, oldest first; `cu_seqlens` [N + 1] bounds
    sequences that are packed along time; `inplace_final_state` writes the state after the last
    token over `initial_state`.
    """
    if cu_seqlens is None:
        y, final_state = _convolve(x, weight, initial_state)
    else:
        y, final_state = _convolve_packed(x, weight, initial_state, cu_seqlens)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), give_state(
        final_state, initial_state, output_final_state, inplace_final_state
    )


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def token_decoder(*args: object, **kwargs: object) -> None:
    """No kernel runs a whole decoding step without the package."""


# The package's own operators choose among GPU kernels: they take the place of the above where it is
# installed.
try:
    from megatron_patch.ops import meta_linear_attention, short_convolution, swiglu, token_decoder
except ImportError:
    pass

__all__ = ["meta_linear_attention", "short_convolution", "swiglu", "token_decoder"]
