"""The Triton kernels' entries: which of them serve a call."""

from __future__ import annotations

from torch import Tensor

from megatron_patch.ops.checks import records_gradients
from megatron_patch.ops.torch_ops import give_state
from megatron_patch.ops.triton import convolution, operator, step


def meta_linear_attention(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    aug: Tensor | None = None,
    out_gate: Tensor | None = None,
    *,
    out_gate_bias: Tensor | None = None,
    tau: float,
    scale: float,
    norm_eps: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The operator of `megatron_patch.ops.meta_linear_attention`, on arguments it has checked."""
    tensors = (q, gate_logits, v, aug, out_gate)
    if is_step(q, cu_seqlens, *tensors, out_gate_bias, initial_state):
        arguments = (*tensors, out_gate_bias, initial_state, float(tau), float(scale), norm_eps)
        if inplace_final_state:
            return step.attention_(*arguments), initial_state
        out, final_state = step.attention(*arguments)
        return out, final_state if output_final_state else None
    out, final_state = operator.meta_linear_attention(
        *tensors,
        out_gate_bias=out_gate_bias,
        tau=tau,
        scale=scale,
        norm_eps=norm_eps,
        initial_state=initial_state,
        output_final_state=output_final_state or inplace_final_state,
        cu_seqlens=cu_seqlens,
    )
    return out, give_state(final_state, initial_state, output_final_state, inplace_final_state)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    activation: str | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    inplace_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The operator of `megatron_patch.ops.short_convolution`, on arguments it has checked."""
    silu = activation == "silu"
    if is_step(x, cu_seqlens, x, weight, initial_state):
        if inplace_final_state:
            return step.convolution_(x, weight, initial_state, silu), initial_state
        y, final_state = step.convolution(x, weight, initial_state, silu)
        return y, final_state if output_final_state else None
    y, final_state = convolution.short_convolution(
        x, weight, initial_state, cu_seqlens, silu, output_final_state or inplace_final_state
    )
    return y, give_state(final_state, initial_state, output_final_state, inplace_final_state)


def is_step(x: Tensor, cu_seqlens: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the kernels for one token serve a call on x [B, T, ...]."""
    return x.shape[1] == 1 and cu_seqlens is None and not records_gradients(*tensors)
