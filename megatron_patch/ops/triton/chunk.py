"""Meta Linear Attention by chunks: the kernels of chunk_*.py as a forward and a backward pass, as
custom operators of PyTorch with gradients, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_patch.ops.backends import hopper_chunks
from megatron_patch.ops.checks import records_gradients
from megatron_patch.ops.context_parallel import ContextParallel, Exchange
from megatron_patch.ops.joined import parts_of_one
from megatron_patch.ops.torch_ops import give_state
from megatron_patch.ops.triton import fused_recurrent
from megatron_patch.ops.triton.chunk_bwd import chunk_bwd, chunk_bwd_dv, sum_partials
from megatron_patch.ops.triton.chunk_fallback import chunk_bwd_fallback
from megatron_patch.ops.triton.chunk_h import chunk_bwd_dh, chunk_fwd_h
from megatron_patch.ops.triton.chunk_o import chunk_bwd_o, chunk_fwd_o
from megatron_patch.ops.triton.chunk_prepare import Prepared, chunk_prepare
from megatron_patch.ops.triton.config import ChunkCall, compile_key, configure
from megatron_patch.ops.triton.launch import (
    compiled_together,
    differentiable,
    is_compiling,
    is_decoding_step,
    last_stride_one,
    without_last,
)
from megatron_patch.ops.triton.tiles import count_chunks


@compiled_together(compile_key)
def forward(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    out_gate_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    tau: float,
    scale: float,
    norm_eps: float,
    output_final_state: bool,
    keep: bool,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the output, the final state (empty if not asked for), and what `backward` needs: h,
    x_hat, rstd and the five of `Prepared` (all empty unless `keep`). With `exchange` the initial
    state comes from other ranks."""
    with torch.cuda.device_of(q):
        call = ChunkCall(q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale)
        prepared, scores = chunk_prepare(call)
        h, final_state = chunk_fwd_h(call, prepared, initial_state, output_final_state, exchange)
        out = call.new_output(*v.shape)
        x_hat = rstd = None
        if keep:
            # `new_output`, because gradients may take this memory.
            x_hat = call.new_output(*v.shape, dtype=call.dtype)
            rstd = call.new(*v.shape[:3])
        write_output = chunk_fwd_o
        if hopper_chunks(q.dtype, q.device, call.k, call.width):
            from megatron_patch.ops.hopper import chunk_fwd_o as hopper

            if hopper.fits(call.q, call.v, call.out_gate, call.bias, call.config.chunk):
                write_output = hopper.chunk_fwd_o
        write_output(call, prepared, scores, h, out, x_hat, rstd, norm_eps)
    if not keep:
        return out, final_state, *[q.new_empty(0) for _ in range(8)]
    kept = (h, x_hat, rstd, *prepared)
    if is_compiling():  # compile the backward pass too: its kernels take longest
        backward(
            q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
            *kept, torch.empty_like(out), None, tau, scale, True, exchange,
        )  # fmt: skip
    return out, final_state, *kept


@compiled_together(compile_key)
def backward(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    out_gate_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    x_hat: Tensor,
    rstd: Tensor,
    qg: Tensor,
    kg: Tensor,
    g_last: Tensor,
    fallback: Tensor,
    aug_score: Tensor,
    d_out: Tensor,
    d_final_state: Tensor | None,
    tau: float,
    scale: float,
    overwrite: bool,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, gate logits, v, aug, out_gate, out_gate_bias and the initial
    state; empty for those that were None. With `overwrite`, gradients may take the memory of x_hat,
    qg and kg, which nobody reads afterwards, and those of q, gate logits, v and out_gate are slices
    of one tensor if these are. With `exchange` the gradient of the final state comes from other
    ranks."""
    with torch.cuda.device_of(q):
        call = ChunkCall(q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale)
        prepared = Prepared(qg, kg, g_last, fallback, aug_score)
        chunks = call.indices.chunk_count, call.heads
        # Never float16, in which d_y would overflow under loss scaling.
        d_y = x_hat if overwrite else call.new_output(*v.shape, dtype=call.dtype)
        parts = q, gate_logits, v, out_gate
        slices = None
        if overwrite and parts_of_one(parts) is not None:
            widths = [part.shape[3] for part in parts]
            slices = call.new_output(*q.shape[:3], sum(widths)).split(widths, dim=3)
        if slices is not None:
            d_out_gate = slices[3]
        else:
            d_out_gate = call.new_output(*(v.shape if out_gate is not None else (0,)))
        d_bias = call.new(*((*chunks, call.width) if out_gate_bias is not None else (0,)))
        chunk_bwd_o(call, x_hat, rstd, last_stride_one(d_out), d_y, d_out_gate, d_bias)
        dh, d_initial = chunk_bwd_dh(
            call, prepared, d_y, d_final_state, initial_state is not None, exchange
        )
        write_gradients, one_tile = chunk_bwd, call.k <= call.config.bwd_k
        if hopper_chunks(q.dtype, q.device, call.k, call.width):
            from megatron_patch.ops.hopper import chunk_bwd as hopper

            if hopper.fits(*call.inputs, call.config.chunk):
                write_gradients, one_tile = hopper.chunk_bwd, True

        def gradient_in(memory: Tensor, is_free: bool) -> Tensor:
            """Returns `memory`, if its last reader may write the gradient there, or else new."""
            free = is_free and memory.dtype == q.dtype
            return memory if free else call.new_output(*memory.shape)

        if slices is not None:
            d_q, d_gates, d_v, _ = slices
        else:
            d_q, d_gates = gradient_in(qg, overwrite), gradient_in(kg, overwrite)
            # With several tiles of K, d_y is read again after d_v has been written.
            d_v = gradient_in(d_y, one_tile)
        d_aug = call.new(*((*chunks, call.k) if aug is not None else (0,)))
        gradients = d_q, d_gates, d_v, d_aug
        dv_results = (None, None)
        if not one_tile:
            dv_results = chunk_bwd_dv(call, d_y, prepared, d_v, dh)
        write_gradients(call, d_y, prepared, dv_results, h, dh, gradients)
        chunk_bwd_fallback(call, d_y, prepared, h, dh, gradients)
        if aug is not None:
            d_aug = sum_partials(d_aug, aug.dtype)
        if out_gate_bias is not None:
            d_bias = sum_partials(d_bias, out_gate_bias.dtype)
    return d_q, d_gates, d_v, d_aug, d_out_gate, d_bias, d_initial


_forward = torch.library.custom_op("metala::forward", without_last(forward), mutates_args=())
_backward = torch.library.custom_op("metala::backward", without_last(backward), mutates_args=())


@_forward.register_fake
def _(
    q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
    tau, scale, norm_eps, output_final_state, keep,
):  # fmt: skip
    (batch, time, heads, k), width = q.shape, v.shape[3]
    config = configure(int(k), int(width), q.dtype)  # kernels are compiled for their widths
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = count_chunks(batch, time, config.chunk, cu_seqlens)
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
def _(q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, *_others):
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
    ctx.inputs = len(inputs)
    ctx.exchange = inputs[13] if len(inputs) > 13 else None
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


# PyTorch before 2.6 cannot tell, so assume that the graph is kept.
_retains_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _gradients(
    ctx: Any, eager: bool, d_out: Tensor | None, d_final_state: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if d_final_state is not None and d_final_state.numel() == 0:
        d_final_state = None
    if d_out is None:
        if d_final_state is None:
            return (None,) * ctx.inputs
        d_out = torch.zeros_like(tensors[2])
    # Unless the graph is retained, nobody reads the saved tensors after this pass.
    overwrite = eager and not _retains_graph()
    given = *tensors, d_out, d_final_state, *ctx.numbers, overwrite
    found = backward(*given, ctx.exchange) if eager else _backward(*given)
    found = tuple(
        gradient if tensor is not None else None
        for gradient, tensor in zip(found, tensors[:7], strict=True)
    )
    return (*found, *(None,) * (ctx.inputs - len(found)))


_with_gradients = differentiable(_forward, forward, _setup_context, _gradients, 2)


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
    context: ContextParallel | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes `megatron_patch.ops.meta_linear_attention` on arguments that it has checked.

    One token without gradients takes the recurrent kernel, everything else the chunk kernels.
    States and sums are float32. Matrix products take bfloat16 operands for bfloat16 tensors and
    three TensorFloat-32 terms for float16 and float32.
    """
    tensors = (q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state)
    numbers = float(tau), float(scale), float(norm_eps)
    if context is not None:
        keep, exchange = records_gradients(*tensors), context.exchange(q, cu_seqlens)
        out, *_ = _with_gradients(*tensors, cu_seqlens, *numbers, False, keep, exchange)
        return out, None
    if is_decoding_step(q, cu_seqlens, *tensors):
        if inplace_final_state:
            return fused_recurrent.attention_(*tensors, *numbers), initial_state
        out, final_state = fused_recurrent.attention(*tensors, *numbers)
        return out, final_state if output_final_state else None
    wants_state = output_final_state or inplace_final_state
    out, final_state, *_ = _with_gradients(
        *tensors, cu_seqlens, *numbers, wants_state, records_gradients(*tensors)
    )
    return out, give_state(final_state, initial_state, output_final_state, inplace_final_state)
