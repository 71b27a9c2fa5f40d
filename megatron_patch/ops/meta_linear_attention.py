"""The public operator: checks its arguments and calls the backend that serves them."""

from __future__ import annotations

from functools import partial

import torch

from megatron_patch.ops.backends import choose, function_of, names_of
from megatron_patch.ops.checks import (
    FLOAT_DTYPES,
    check_cu_seqlens,
    check_inplace_final_state,
    check_number,
    check_tensor,
)
from megatron_patch.ops.context_parallel import ContextParallel, incoming_state
from megatron_patch.ops.torch_ops import without_autocast

BACKENDS = names_of("meta_linear_attention")


def meta_linear_attention(
    q: torch.Tensor,
    gate_logits: torch.Tensor,
    v: torch.Tensor,
    aug: torch.Tensor | None = None,
    out_gate: torch.Tensor | None = None,
    *,
    out_gate_bias: torch.Tensor | None = None,
    tau: float = 16.0,
    scale: float | None = None,
    norm_eps: float = 1e-5,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    context: ContextParallel | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes Meta Linear Attention (arXiv 2411.10741), from the projections to the gated output.

    For each batch entry and head, with K the key width and V the value width::

        g_t = logsigmoid(gate_logits_t) / tau
        k_t = 1 - exp(g_t)
        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        y_t = scale S_t^T q_t + sigmoid((q_t . (aug * k_t)) v_t)
        out_t = silu(out_gate_t + out_gate_bias) * LayerNorm_V(y_t)

    A decoding step is T = 1 with the state of the tokens before.

    Args:
        q, gate_logits: [B, T, H, K], float16, bfloat16, float32 or float64, like `v` and
            `out_gate`, on one device. Any strides: transposed time-major tensors and slices of one
            projection are read where they lie. Not modified.
        v: [B, T, H, V].
        aug: [H, K], any float dtype; `None` leaves the self-augmentation term out.
        out_gate: [B, T, H, V]; `None` returns LayerNorm(y) ungated.
        out_gate_bias: [H, V], any float dtype, added to `out_gate`.
        tau: the log decay's divisor, above 0.
        scale: the scale of S^T q; `None` for K ** -0.5.
        norm_eps: epsilon of the LayerNorm, above 0.
        initial_state: [N, H, K, V] in float32 (float64 for float64 inputs), N = B or the number of
            packed sequences; `None` for zeros. Gradients flow to it.
        output_final_state: whether to return the state after the last token of each sequence.
        inplace_final_state: whether to write the final state over `initial_state` and return that;
            implies `output_final_state`. For decoding, with gradients off.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of N sequences packed along time; any
            may be empty. B must be 1, and the values rise from 0 to T. They are checked on the CPU
            alone, where that is free.
        context: the ranks that split the tokens (`megatron_patch.ops.context_parallel`). The
            initial state is then that of the tokens on the ranks before, and there is no final one.
            All of them make the same calls in the same order, backward passes too.
        backend: "triton", "fla", "chunked" (plain PyTorch), "reference" (the recurrence step by
            step), or "auto": on CUDA the first of "triton" (only on GPUs and for widths where it
            was checked) and "fla" that can run, and otherwise, also for float64, "chunked". See
            `megatron_patch.ops.backends`.

    Returns:
        out [B, T, H, V] in the dtype of `v`, and the final state [N, H, K, V] in float32 (float64
        for float64 inputs), or `None`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value (the message names it,
            with what was found and what was wanted), the backend asked for by name cannot run
            here, `inplace_final_state` is asked for without an initial state, with one whose
            entries share memory, or while gradients are recorded, or `context` comes with a state.
    """
    check_tensor("q", q, "B, T, H, K", [None] * 4, FLOAT_DTYPES)
    batch, time, heads, key_width = q.shape
    same, device = (q.dtype,), q.device
    check_tensor("gate_logits", gate_logits, "B, T, H, K", q.shape, same, device)
    check_tensor("v", v, "B, T, H, V", [batch, time, heads, None], same, device)
    value_width = v.shape[-1]
    if aug is not None:
        check_tensor("aug", aug, "H, K", [heads, key_width], FLOAT_DTYPES, device)
    if out_gate is not None:
        check_tensor("out_gate", out_gate, "B, T, H, V", v.shape, same, device)
    if out_gate_bias is not None:
        check_tensor(
            "out_gate_bias", out_gate_bias, "H, V", [heads, value_width], FLOAT_DTYPES, device
        )
        if out_gate is None:
            raise ValueError(
                f"out_gate_bias {list(out_gate_bias.shape)}: found without out_gate, "
                "wanted with the out_gate that it is added to"
            )
    check_number("tau", tau, positive=True)
    check_number("norm_eps", norm_eps, positive=True)
    if scale is None:
        scale = key_width**-0.5
    check_number("scale", scale, positive=False)
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, time, device)
        cu_seqlens = cu_seqlens.contiguous()  # kernels read it by its address
        sequences = len(cu_seqlens) - 1
    if initial_state is not None:
        check_tensor(
            "initial_state",
            initial_state,
            "N, H, K, V",
            [sequences, heads, key_width, value_width],
            (torch.float64 if q.dtype == torch.float64 else torch.float32,),
            device,
        )

    if inplace_final_state:
        check_inplace_final_state(initial_state, q, gate_logits, v, aug, out_gate, out_gate_bias)

    backend = choose("meta_linear_attention", backend, q.dtype, device, K=key_width, V=value_width)
    attend = function_of("meta_linear_attention", backend)
    if context is not None:
        if initial_state is not None or output_final_state or inplace_final_state:
            raise ValueError("context: found with a state, wanted neither initial nor final state")
        if backend == "triton":
            attend = partial(attend, context=context)
        else:
            initial_state = incoming_state(gate_logits, v, tau, context, cu_seqlens)
    # Every backend chooses its own precision. Autocast would halve that of the matrix products.
    with without_autocast(device):
        return attend(
            q,
            gate_logits,
            v,
            aug,
            out_gate,
            out_gate_bias=out_gate_bias,
            tau=tau,
            scale=scale,
            norm_eps=norm_eps,
            initial_state=initial_state,
            output_final_state=output_final_state,
            inplace_final_state=inplace_final_state,
            cu_seqlens=cu_seqlens,
        )
