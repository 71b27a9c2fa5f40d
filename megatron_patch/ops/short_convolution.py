"""The public causal depthwise convolution along time, with the state that decoding needs."""

from __future__ import annotations

import torch

from megatron_patch.ops.backends import implementation
from megatron_patch.ops.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_cu_seqlens,
    check_inplace_final_state,
    check_tensor,
)


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
    """Computes y[t, d] = activation(sum_w weight[d, 0, w] x[t - W + 1 + w, d]), the convolution
    before MetaLA's projections.

    The initial state stands for x before the sequence's first token. A decoding step is T = 1 with
    a state. The sum is computed in float32 (float64 for float64).

    Args:
        x: [B, T, D] float16, bfloat16, float32 or float64, any strides; not modified.
        weight: [D, 1, W], as in `torch.nn.Conv1d`; any float dtype.
        activation: "silu" or `None`.
        initial_state: [N, D, W - 1] in the dtype of x, the inputs before the first token, oldest
            first; N = B or the number of packed sequences; `None` for zeros. Gradients flow to it.
        output_final_state: whether to return the state after the last token of each sequence.
        inplace_final_state: whether to write the final state over `initial_state` and return that;
            implies `output_final_state`. For decoding, with gradients off.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of N sequences packed along time; any
            may be empty. B must be 1, and the values rise from 0 to T (checked on the CPU alone).
        backend: "triton" (CUDA), "causal_conv1d" (the package of that name: CUDA, W of 2 to 4, D a
            multiple of 8, no state together with cu_seqlens), "torch", or "auto": the first of
            these that can run, "triton" only on GPUs where it was checked. See
            `megatron_patch.ops.backends`.

    Returns:
        y [B, T, D] in the dtype of x, and the final state [N, D, W - 1] in the dtype of x, or
        `None`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, the backend asked for
            by name cannot run here, or `inplace_final_state` is asked for without an initial state,
            with one whose entries share memory, or while gradients are recorded.
    """
    check_choice("activation", activation, ("silu", None))
    check_tensor("x", x, "B, T, D", [None] * 3, FLOAT_DTYPES)
    batch, time, channels = x.shape
    check_tensor("weight", weight, "D, 1, W", [channels, 1, None], FLOAT_DTYPES, x.device)
    kernel_size = weight.shape[-1]
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, time, x.device)
        cu_seqlens = cu_seqlens.contiguous()  # kernels read it by its address
        sequences = len(cu_seqlens) - 1
    if initial_state is not None:
        shape = [sequences, channels, kernel_size - 1]
        check_tensor("initial_state", initial_state, "N, D, W - 1", shape, (x.dtype,), x.device)

    if inplace_final_state:
        check_inplace_final_state(initial_state, x, weight)

    packed_state = cu_seqlens is not None and (initial_state is not None or output_final_state)
    convolve = implementation(
        "short_convolution", backend, x.dtype, x.device,
        D=channels, W=kernel_size, packed_state=packed_state,
    )  # fmt: skip
    return convolve(
        x,
        weight,
        activation=activation,
        initial_state=initial_state,
        output_final_state=output_final_state,
        inplace_final_state=inplace_final_state,
        cu_seqlens=cu_seqlens,
    )
