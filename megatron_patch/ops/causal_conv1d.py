"""The short convolution by the package causal-conv1d, for CUDA where our own kernels do not run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn

from megatron_patch.ops.torch_ops import give_state, transposed_copy


def unsupported_reason(
    dtype: torch.dtype, device: torch.device, *, D: int, W: int, packed_state: bool
) -> str | None:
    """Returns why the package cannot serve a call, or `None` if it can."""
    if not 2 <= W <= 4:
        return f"found a width of W = {W}, wanted 2, 3 or 4"
    if D % 8:
        return f"found D = {D}, wanted a multiple of 8"
    if packed_state:
        return "found cu_seqlens together with a state, wanted one of the two"
    return None


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    inplace_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes `megatron_patch.ops.short_convolution` on arguments that it has checked.

    The package's kernel wants [B, D, T] with channels or time contiguous.
    """
    time, past = x.shape[1], weight.shape[-1] - 1
    # Only channel-last takes a state, and its strides must be whole words of 16 bytes.
    aligned = x.stride(2) == 1 and x.stride(1) > 1 and not (x.stride(0) % 8 or x.stride(1) % 8)
    channel_last = (x if aligned else x.contiguous()).transpose(1, 2)
    state = initial_state
    if state is not None:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    sequence = None
    if cu_seqlens is not None:
        token = torch.arange(time, device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)[None].int()
    y = causal_conv1d_fn(
        channel_last,
        weight[:, 0],
        seq_idx=sequence,
        initial_states=state,
        activation=activation,
    )
    if not output_final_state and not inplace_final_state:
        return y.transpose(1, 2), None
    if time >= past:
        inputs = x[:, time - past :]
    elif initial_state is None:
        inputs = F.pad(x, (0, 0, past - time, 0))
    else:
        inputs = torch.cat([initial_state.transpose(1, 2)[:, time:], x], dim=1)
    return y.transpose(1, 2), give_state(
        transposed_copy(inputs), initial_state, output_final_state, inplace_final_state
    )
