"""Forward and backward of MetaLA as custom operators of PyTorch, around the kernels' launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_patch.ops.triton.configuration import Configuration, configure, power_of_two
from megatron_patch.ops.triton.factors import factors
from megatron_patch.ops.triton.gradients import key_gradients, value_gradients
from megatron_patch.ops.triton.layout import Layout, lay_out
from megatron_patch.ops.triton.output import output, output_backward
from megatron_patch.ops.triton.states import carry, scan


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
    out, final_state = _forward(
        q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
        float(tau), float(scale), float(norm_eps), output_final_state,
    )  # fmt: skip
    return out, final_state if output_final_state else None


class _Call:
    """One call's tensors and numbers, and the launches that its two passes share."""

    def __init__(self, q, gate_logits, v, aug, out_gate, bias, cu_seqlens, tau, scale, norm_eps):
        self.q, self.gates, self.v, self.out_gate = q, gate_logits, v, out_gate
        self.aug = None if aug is None else aug.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.batch, self.time, self.heads, self.k = q.shape
        self.width = v.shape[-1]
        self.scale, self.inverse_tau, self.norm_eps = scale, 1.0 / tau, norm_eps
        self.config: Configuration = configure(self.k, self.width, q.dtype)
        self.bounds = cu_seqlens
        self.packed = cu_seqlens is not None
        self.layout: Layout = lay_out(
            self.batch, self.time, self.config.chunk, self.config.segment, cu_seqlens
        )
        # Between kernels, tensors are stored as they will be rounded for products.
        self.dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        self._factors()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def outputs(self, *shape: int) -> Tensor:
        """What callers receive: zeros in rows that no packed sequence covers."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=self.q.dtype, device=self.q.device)

    def widths(self) -> dict:
        return dict(H=self.heads, K=self.k, C=self.config.chunk, PRECISION=self.config.precision)

    def _factors(self) -> None:
        layout, config, heads = self.layout, self.config, self.heads
        shape = (self.batch, self.time, heads)
        self.early = self.empty(*shape, self.k, dtype=self.dtype)
        self.late = self.empty(*shape, self.k, dtype=self.dtype)
        self.chunk_decays = self.empty(layout.chunk_count, heads, self.k)
        self.exact = self.empty(layout.chunk_count, heads, dtype=torch.int32)
        self.similarity = self.empty(*shape) if self.aug is not None else None
        factors[(layout.chunk_count, heads)](
            self.q, self.gates, self.aug, self.early, self.late, self.chunk_decays, self.exact,
            self.similarity, layout.chunk_table, self.bounds,
            self.time, layout.chunks, self.inverse_tau, *self.q.stride(), *self.gates.stride(),
            **self.widths(), BK=power_of_two(self.k),
            HAS_AUG=self.aug is not None, PACKED=self.packed, num_warps=config.factor_warps,
        )  # fmt: skip

    def states(
        self, y: Tensor, boundary: Tensor | None, reverse: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor], bool, Tensor]:
        """Carries the state over all chunks: forwards with y = v, backwards with y = dy.

        Returns what `entering_state` reads, its FIX, and the state that leaves the last token
        (backwards: the gradient of the one that enters the first), [N, H, K, V] float32.
        """
        config, layout, heads, k, width = (
            self.config, self.layout, self.heads, self.k, self.width,
        )  # fmt: skip
        states = self.empty(layout.chunk_count, heads, k, width, dtype=self.dtype)
        since = self.empty(layout.chunk_count, heads, k)
        totals = self.empty(layout.segment_count, heads, k, width)
        total_decays = self.empty(layout.segment_count, heads, k)
        tiles = triton.cdiv(k, config.carry_k) * triton.cdiv(width, config.carry_v)
        carry[(layout.segment_count, heads, tiles)](
            self.early if reverse else self.late, y, self.chunk_decays, self.exact,
            states, since, totals, total_decays, layout.segment_table, self.bounds,
            self.time, layout.segments, layout.chunks, config.segment // config.chunk,
            self.scale, *y.stride(),
            **self.widths(), V=width, BK=config.carry_k, BV=config.carry_v,
            SEGMENT=config.segment, REVERSE=reverse, PACKED=self.packed,
            num_warps=config.carry_warps, num_stages=config.carry_stages,
        )  # fmt: skip
        fix = self.packed or boundary is not None or layout.segments > 1
        if not fix:
            return (states, since, totals), False, totals
        final = self.empty(layout.sequences, heads, k, width)
        block_k, block_v = 16, min(64, power_of_two(width))
        scan[(layout.sequences, heads, triton.cdiv(k, block_k) * triton.cdiv(width, block_v))](
            totals, total_decays, boundary, final, layout.segment_bounds, layout.segments,
            H=heads, K=k, V=width, BK=block_k, BV=block_v,
            HAS_INITIAL=boundary is not None, REVERSE=reverse, PACKED=self.packed,
            num_warps=2,
        )  # fmt: skip
        return (states, since, totals), True, final

    def shared(self) -> tuple[Tensor | None, ...]:
        return self.early, self.late, self.exact, self.similarity

    def numbers(self) -> tuple:
        layout, config = self.layout, self.config
        return (
            layout.chunk_table, self.bounds, self.time, layout.chunks, layout.segments,
            config.segment // config.chunk, self.scale, self.inverse_tau,
        )  # fmt: skip

    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride(), *self.gates.stride(), *self.v.stride())

    def gate_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.out_gate is None else self.out_gate.stride()

    def output_options(self, fix: bool, warps: int, registers: int | None) -> dict:
        return dict(
            **self.widths(),
            V=self.width,
            BK=self.config.output_k,
            BV=self.config.output_v,
            HAS_AUG=self.aug is not None,
            HAS_GATE=self.out_gate is not None,
            HAS_BIAS=self.bias is not None,
            FIX=fix,
            PACKED=self.packed,
            num_warps=warps,
            maxnreg=registers,
        )


def _sum(shares: Tensor) -> Tensor:
    """Sum over dimension 0, as a product: several times faster than a reduction of tall tensors."""
    ones = shares.new_ones(1, shares.shape[0])
    return (ones @ shares.flatten(1)).view(shares.shape[1:])


def _boundary(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()


@torch.library.custom_op("metala::forward", mutates_args=())
def _forward(
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
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):
        call = _Call(
            q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale, norm_eps
        )
        config = call.config
        entering, fix, final_state = call.states(v, _boundary(initial_state), reverse=False)
        out = call.outputs(*v.shape)
        output[(call.layout.chunk_count, call.heads)](
            q, gate_logits, v, out_gate, call.bias, *call.shared(), *entering, out,
            *call.numbers(), norm_eps, *call.strides(), *call.gate_strides(),
            **call.output_options(fix, config.output_warps, config.output_registers),
        )  # fmt: skip
    if not output_final_state:
        final_state = final_state.new_empty(0)
    return out, final_state


@_forward.register_fake
def _(
    q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
    tau, scale, norm_eps, output_final_state,
):  # fmt: skip
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not output_final_state:
        return out, q.new_empty(0, dtype=torch.float32)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return out, q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("metala::backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_final_state: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, gate logits, v, aug, out_gate, out_gate_bias and the initial state; empty for
    those that were None. Recomputes the states rather than keep them from the forward pass."""
    with torch.cuda.device_of(q):
        call = _Call(
            q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale, norm_eps
        )
        config, grid = call.config, (call.layout.chunk_count, call.heads)
        entering, fix, _ = call.states(v, _boundary(initial_state), reverse=False)

        d_y = call.empty(*v.shape, dtype=call.dtype)  # float16 would overflow under loss scaling
        d_out_gate = call.outputs(*(v.shape if out_gate is not None else (0,)))
        d_bias = call.empty(*((*grid, call.width) if call.bias is not None else (0,)))
        output_backward[grid](
            q, gate_logits, v, out_gate, call.bias, *call.shared(), *entering,
            d_out, d_y, d_out_gate, d_bias, *call.numbers(), norm_eps,
            *call.strides(), *call.gate_strides(), *d_out.stride(),
            **call.output_options(fix, config.backward_warps, config.backward_registers),
        )  # fmt: skip
        leaving, d_fix, d_initial = call.states(d_y, _boundary(d_final_state), reverse=True)
        d_v = call.outputs(*v.shape)
        d_similarity = None if aug is None else call.empty(*q.shape[:3])
        value_gradients[grid](
            q, gate_logits, v, d_y, *call.shared(), *leaving, d_v, d_similarity,
            *call.numbers(), *call.strides(),
            **call.widths(), V=call.width, BK=config.output_k, BV=config.output_v,
            HAS_AUG=aug is not None, D_FIX=d_fix, PACKED=call.packed,
            num_warps=config.value_warps, maxnreg=config.value_registers,
        )  # fmt: skip
        # The factors are read for the last time: their memory takes the gradients.
        reuse = call.dtype == q.dtype and not call.packed
        d_q = call.early if reuse else call.outputs(*q.shape)
        d_gates = call.late if reuse else call.outputs(*q.shape)
        d_aug = call.empty(*((*grid, call.k) if aug is not None else (0,)))
        for is_exact in (False, True):
            key_gradients[(triton.cdiv(call.k, config.key_k), *grid)](
                q, gate_logits, v, call.aug, d_y, call.early, call.late, call.exact, d_similarity,
                *entering, *leaving, d_q, d_gates, d_aug, *call.numbers(), *call.strides(),
                **call.widths(), V=call.width, BK=config.key_k, BV=config.key_v,
                HAS_AUG=aug is not None, FIX=fix, D_FIX=d_fix, PACKED=call.packed, EXACT=is_exact,
                num_warps=config.key_warps, num_stages=config.key_stages,
                maxnreg=config.key_registers,
            )  # fmt: skip
    if aug is not None:
        d_aug = _sum(d_aug).to(aug.dtype)
    if out_gate_bias is not None:
        d_bias = _sum(d_bias).to(out_gate_bias.dtype)
    if initial_state is None:
        d_initial = d_initial.new_empty(0)
    return d_q, d_gates, d_v, d_aug, d_out_gate, d_bias, d_initial


@_backward.register_fake
def _(
    d_out, d_final_state, q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state,
    cu_seqlens, tau, scale, norm_eps,
):  # fmt: skip
    def like(tensor, dtype=None):
        if tensor is None:
            return q.new_empty(0, dtype=dtype or q.dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=q.device)

    return (
        like(q), like(gate_logits), like(v), like(aug, torch.float32), like(out_gate),
        like(out_gate_bias, torch.float32), like(initial_state, torch.float32),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:8], inputs[8:11]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, d_out, d_final_state):
    tensors = ctx.saved_tensors
    if d_final_state is not None and d_final_state.numel() == 0:
        d_final_state = None
    if d_out is None:
        if d_final_state is None:
            return (None,) * 12
        d_out = torch.zeros_like(tensors[2])
    found = _backward(d_out, d_final_state, *tensors, *ctx.numbers)
    found = tuple(
        gradient if tensor is not None else None
        for gradient, tensor in zip(found, tensors[:7], strict=True)
    )
    return (*found, None, None, None, None, None)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
