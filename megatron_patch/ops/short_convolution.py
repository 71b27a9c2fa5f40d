"""Causal depthwise convolution along time, with the state that decoding needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_patch.ops.backends import choose, names_of
from megatron_patch.ops.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_cu_seqlens,
    check_inplace_final_state,
    check_tensor,
)
from megatron_patch.ops.epilogue import compute_dtype, give_state

CONVOLUTION_BACKENDS = names_of("short_convolution")


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y[t, d] = activation(sum_w weight[d, 0, w] x[t - W + 1 + w, d]), the convolution before
    MetaLA's projections. Where x would be read before the sequence's first token, the initial state
    stands.

    T = 1 with a state is the decoding step. The sum is computed in float32 (float64 for float64).

    Args:
        x: [B, T, D] float16, bfloat16, float32 or float64, any strides; not modified.
        weight: [D, 1, W], as in `torch.nn.Conv1d`; any float dtype.
        activation: "silu" or `None`.
        initial_state: [N, D, W - 1] in the dtype of x, the inputs before the first token, oldest
            first; N = B or the number of packed sequences; `None` for zeros. Gradients flow to it.
        output_final_state: whether to return the state after the last token of each sequence.
        inplace_final_state: writes the final state over `initial_state` and returns that; implies
            `output_final_state`. For decoding, with gradients off.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of N sequences packed along time, of
            which any may be empty: B must be 1, the values rise from 0 to T (checked on the CPU
            alone).
        backend: "triton" (CUDA), "causal_conv1d" (the package of that name: CUDA, W of 2 to 4, D a
            multiple of 8, no state together with cu_seqlens), "torch", or "auto", which takes the
            first of these that can run, "triton" on GPUs that it was checked on; see
            `megatron_patch.ops.backends`.

    Returns:
        y [B, T, D] in the dtype of x, and the final state [N, D, W - 1] in the dtype of x, or
        `None`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, the backend asked for
            by name cannot run here, or `inplace_final_state` is asked for without an initial state,
            with one whose entries share memory, or while gradients are recorded.
    """
    check_choice("backend", backend, CONVOLUTION_BACKENDS)
    check_choice("activation", activation, ("silu", None))
    check_tensor("x", x, "B, T, D", [None] * 3, FLOAT_DTYPES)
    batch, time, channels = x.shape
    check_tensor("weight", weight, "D, 1, W", [channels, 1, None], FLOAT_DTYPES, x.device)
    width = weight.shape[-1]
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, time, x.device)
        cu_seqlens = cu_seqlens.contiguous()  # kernels read it by its address
        sequences = len(cu_seqlens) - 1
    if initial_state is not None:
        shape = [sequences, channels, width - 1]
        check_tensor("initial_state", initial_state, "N, D, W - 1", shape, (x.dtype,), x.device)

    if inplace_final_state:
        check_inplace_final_state(initial_state, x, weight)
    states = initial_state, output_final_state, inplace_final_state

    packed_state = cu_seqlens is not None and (initial_state is not None or output_final_state)
    backend = choose(
        "short_convolution", backend, x.dtype, x.device,
        D=channels, W=width, packed_state=packed_state,
    )  # fmt: skip
    if backend == "triton":
        from megatron_patch.ops.triton import short_convolution as implementation

        return implementation(x, weight, activation, *states, cu_seqlens)
    if backend == "causal_conv1d":
        from megatron_patch.ops.causal_conv1d import short_convolution as implementation

        return implementation(x, weight, activation, *states, cu_seqlens)
    if cu_seqlens is None:
        y, final_state = _convolve(x, weight, initial_state)
    else:
        y, final_state = _convolve_packed(x, weight, initial_state, cu_seqlens)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), give_state(final_state, *states)


def _weighted_sum(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, W - 1 + T, D] and [D, 1, W] to [B, T, D] in float32 or float64: one fused multiply-add
    per tap, which beats a grouped `conv1d` on the CPU and needs no change of layout."""
    dtype = compute_dtype(padded)
    width = weight.shape[-1]
    time = padded.shape[1] - width + 1
    padded, weight = padded.to(dtype), weight.to(dtype)
    y = padded[:, :time] * weight[:, 0, 0]
    for tap in range(1, width):
        y = torch.addcmul(y, padded[:, tap : tap + time], weight[:, 0, tap])
    return y


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of one length: the sums [B, T, D] before the activation, and the final state
    [B, D, W - 1], in memory of its own: a few tokens must not keep a whole sequence."""
    time, width = x.shape[1], weight.shape[-1]
    if initial_state is None:
        padded = F.pad(x, (0, 0, width - 1, 0))
    else:
        padded = torch.cat([initial_state.transpose(1, 2), x], dim=1)
    return _weighted_sum(padded, weight), transposed(padded[:, time:])


def _convolve_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences: as `_convolve`, with W - 1 rows of state (or zeros) set before each
    sequence, so that no tap reaches into the sequence before. Shapes do not depend on the values of
    cu_seqlens."""
    time, channels, width = x.shape[1], x.shape[2], weight.shape[-1]
    past, bounds = width - 1, cu_seqlens.long()
    sequences = len(bounds) - 1
    token = torch.arange(time, device=x.device)
    sequence = torch.searchsorted(bounds[1:], token, right=True)
    token_rows = token + (sequence + 1) * past
    # The rows of state before sequence n; those before n + 1 follow the last token of n.
    state_rows = bounds[:, None] + torch.arange(sequences + 1, device=x.device)[:, None] * past
    state_rows = state_rows + torch.arange(past, device=x.device)

    padded = x.new_zeros(time + sequences * past, channels).index_copy(0, token_rows, x[0])
    if initial_state is not None:
        rows = initial_state.transpose(1, 2).reshape(-1, channels)
        padded = padded.index_copy(0, state_rows[:-1].reshape(-1), rows)
    y = _weighted_sum(padded[None], weight)[:, token_rows - past]
    return y, transposed(padded[state_rows[1:] - past])


def transposed(rows: torch.Tensor) -> torch.Tensor:
    """[N, W - 1, D] to [N, D, W - 1], copied."""
    return rows.transpose(1, 2).clone(memory_format=torch.contiguous_format)
