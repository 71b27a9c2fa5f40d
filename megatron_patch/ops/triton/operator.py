"""MetaLA as custom operators of PyTorch, with fakes and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_patch.ops.checks import records_gradients
from megatron_patch.ops.triton import launches
from megatron_patch.ops.triton.configuration import configure
from megatron_patch.ops.triton.differentiable import differentiable
from megatron_patch.ops.triton.layout import unit_count


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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The operator of `megatron_patch.ops.meta_linear_attention`, on arguments it has checked.

    States are float32, sums of decays and of products too. Matrix products take bfloat16 operands
    for bfloat16 tensors, TensorFloat-32 for float16, and three of them per product for float32.
    """
    tensors = (q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state)
    keep = records_gradients(*tensors)
    out, final_state, *_ = _with_gradients(
        *tensors, cu_seqlens, float(tau), float(scale), float(norm_eps), output_final_state, keep
    )
    return out, final_state if output_final_state else None


_forward = torch.library.custom_op("metala::forward", launches.forward, mutates_args=())
_backward = torch.library.custom_op("metala::backward", launches.backward, mutates_args=())


@_forward.register_fake
def _(
    q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
    tau, scale, norm_eps, output_final_state, keep,
):  # fmt: skip
    (batch, time, heads, k), width = q.shape, v.shape[3]
    config = configure(int(k), int(width), q.dtype)  # kernels are compiled for their widths
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = unit_count(batch, time, config.chunk, cu_seqlens)
    final = (sequences, heads, k, width) if output_final_state else (0,)

    def kept(*shape, dtype=torch.float32):
        return q.new_empty(shape, dtype=dtype) if keep else q.new_empty(0)

    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        q.new_empty(final, dtype=torch.float32),
        kept(chunks, heads, k, width, dtype=config.dtype),
        kept(*v.shape, dtype=config.dtype),
        kept(batch, time, heads),
        kept(*q.shape, dtype=config.dtype),
        kept(*q.shape, dtype=config.dtype),
        kept(chunks, heads, k),
        kept(chunks, heads, dtype=torch.int32),
        kept(*((batch, time, heads) if aug is not None else (0,))),
    )


@_backward.register_fake
def _(
    q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
    states, normalised, inverse_std, early, late, chunk_decays, exact, similarity,
    d_out, d_final_state, tau, scale, overwrite,
):  # fmt: skip
    def like(tensor, dtype=None):
        if tensor is None:
            return q.new_empty(0, dtype=dtype or q.dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=q.device)

    return (
        like(q), like(gate_logits), like(v), like(aug, torch.float32), like(out_gate),
        like(out_gate_bias, torch.float32), like(initial_state, torch.float32),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.numbers = inputs[:8], inputs[8:10]
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


# PyTorch before 2.6 does not tell.
_retains_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _gradients(
    ctx: Any, eager: bool, d_out: Tensor | None, d_final_state: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if d_final_state is not None and d_final_state.numel() == 0:
        d_final_state = None
    if d_out is None:
        if d_final_state is None:
            return (None,) * 13
        d_out = torch.zeros_like(tensors[2])
    # Unless the caller retains the graph, nobody reads what was kept after this pass.
    overwrite = eager and not _retains_graph()
    run = launches.backward if eager else _backward
    found = run(*tensors, d_out, d_final_state, *ctx.numbers, overwrite)
    found = tuple(
        gradient if tensor is not None else None
        for gradient, tensor in zip(found, tensors[:7], strict=True)
    )
    return (*found, *(None,) * 6)


_with_gradients = differentiable(_forward, launches.forward, _setup_context, _gradients)
