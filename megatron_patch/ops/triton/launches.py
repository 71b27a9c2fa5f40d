"""Forward and backward of MetaLA as sequences of kernel launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_patch.ops.triton.compilation import compiled_together, launcher
from megatron_patch.ops.triton.configuration import Configuration, configure, power_of_two
from megatron_patch.ops.triton.exact import exact_gradients
from megatron_patch.ops.triton.factors import factors
from megatron_patch.ops.triton.gradients import gradients, value_gradients
from megatron_patch.ops.triton.layout import Layout, lay_out
from megatron_patch.ops.triton.output import output, output_backward
from megatron_patch.ops.triton.shares import sum_shares
from megatron_patch.ops.triton.states import carry, scan


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
        self.dtype = self.config.dtype
        self._factors()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def outputs(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """What callers receive: zeros in rows that no packed sequence covers."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    def gradient_in(self, memory: Tensor) -> Tensor:
        """Where a gradient goes: into `memory`, which its last reader overwrites, if the dtype
        fits."""
        return memory if memory.dtype == self.q.dtype else self.outputs(*memory.shape)

    def widths(self) -> dict:
        return dict(H=self.heads, K=self.k, C=self.config.chunk, PRECISION=self.config.precision)

    def _factors(self) -> None:
        layout, config, heads = self.layout, self.config, self.heads
        shape = (self.batch, self.time, heads)
        # `outputs`, for gradients take their place.
        self.early = self.outputs(*shape, self.k, dtype=self.dtype)
        self.late = self.outputs(*shape, self.k, dtype=self.dtype)
        self.chunk_decays = self.empty(layout.chunk_count, heads, self.k)
        self.exact = self.empty(layout.chunk_count, heads, dtype=torch.int32)
        self.scores = self.empty(*shape, config.chunk, dtype=self.dtype)
        self.similarity = self.empty(*shape) if self.aug is not None else None
        launcher(factors, (layout.chunk_count * heads,))(
            self.q, self.gates, self.aug, self.early, self.late, self.chunk_decays, self.exact,
            self.scores, self.similarity, layout.chunk_table, self.bounds,
            self.time, layout.chunks, self.scale, self.inverse_tau,
            *self.q.stride(), *self.gates.stride(),
            **self.widths(), BK=power_of_two(self.k), RUN=config.factor_run,
            HAS_AUG=self.aug is not None, PACKED=self.packed, num_warps=config.factor_warps,
        )  # fmt: skip

    def states(self, y: Tensor, boundary: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """Carries the state over all chunks: forwards with y = v, backwards with y = dy.

        Returns the states that `load_state` reads, and the state that leaves the last token
        (backwards: the gradient of the one that enters the first), [N, H, K, V] float32.
        """
        config, layout = self.config, self.layout
        heads, k, width = self.heads, self.k, self.width
        states = self.empty(layout.chunk_count, heads, k, width, dtype=self.dtype)

        def walk(entering: Tensor | None, leaving: Tensor | None, decays: Tensor | None) -> None:
            tiles = triton.cdiv(k, config.carry_k) * triton.cdiv(width, config.carry_v)
            launcher(carry, (layout.segment_count * heads, tiles))(
                self.early if reverse else self.late, y, self.chunk_decays, self.exact,
                states, entering, leaving, decays, layout.segment_table,
                layout.chunk_bounds, self.bounds, self.time, layout.segments, layout.chunks,
                *y.stride(),
                **self.widths(), V=width, BK=config.carry_k, BV=config.carry_v,
                SEGMENT=config.segment, HAS_ENTERING=entering is not None, WHOLE=decays is None,
                REVERSE=reverse, PACKED=self.packed,
                num_warps=config.carry_warps, num_stages=config.carry_stages,
            )  # fmt: skip

        final = self.empty(layout.sequences, heads, k, width)
        if layout.segments == 1:
            walk(boundary, final, None)
            return states, final
        entering = self.empty(layout.segment_count, heads, k, width)
        decays = self.empty(layout.segment_count, heads, k)
        walk(None, entering, decays)
        block_k, block_v = 16, min(64, power_of_two(width))
        tiles = triton.cdiv(k, block_k) * triton.cdiv(width, block_v)
        launcher(scan, (layout.sequences * heads, tiles))(
            entering, decays, boundary, final, layout.segment_bounds, layout.segments,
            H=heads, K=k, V=width, BK=block_k, BV=block_v,
            HAS_INITIAL=boundary is not None, REVERSE=reverse, PACKED=self.packed,
            num_warps=2,
        )  # fmt: skip
        walk(entering, None, None)
        return states, final

    def shared(self) -> tuple[Tensor | None, ...]:
        return self.early, self.late, self.exact, self.scores, self.similarity

    def numbers(self) -> tuple:
        return self.layout.chunk_table, self.bounds, self.time, self.layout.chunks

    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride(), *self.gates.stride(), *self.v.stride())

    def gate_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.out_gate is None else self.out_gate.stride()

    def output_options(self, warps: int, registers: int | None) -> dict:
        return dict(
            **self.widths(),
            V=self.width,
            BK=self.config.output_k,
            BV=self.config.output_v,
            HAS_AUG=self.aug is not None,
            HAS_GATE=self.out_gate is not None,
            HAS_BIAS=self.bias is not None,
            PACKED=self.packed,
            num_warps=warps,
            maxnreg=registers,
        )


def _sum(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the chunks' shares [chunks, H, W] in a fixed order."""
    rows, width = shares.shape[0], shares.shape[1] * shares.shape[2]
    total = torch.empty(shares.shape[1:], dtype=dtype, device=shares.device)
    launcher(sum_shares, (triton.cdiv(width, 32),))(shares, total, rows, width, num_warps=4)
    return total


def _boundary(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()


def _kernels(q: Tensor, gate_logits: Tensor, v: Tensor, *others: object) -> tuple:
    """What decides which kernels a pass launches, but for strides and addresses, to which Triton
    specialises them."""
    _, time, heads, k = q.shape
    width = v.shape[3]
    many_segments = time > configure(k, width, q.dtype).segment
    return q.device, q.dtype, heads, k, width, many_segments, *[x is None for x in others]


@compiled_together(_kernels)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state (empty where not asked for), and the states before each chunk, which
    `backward` would otherwise compute again."""
    with torch.cuda.device_of(q):
        call = _Call(
            q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale, norm_eps
        )
        config = call.config
        states, final_state = call.states(v, _boundary(initial_state), reverse=False)
        out = call.outputs(*v.shape)
        launcher(output, (call.layout.chunk_count * call.heads,))(
            v, out_gate, call.bias, *call.shared(), states, out,
            *call.numbers(), norm_eps, *v.stride(), *call.gate_strides(),
            **call.output_options(config.output_warps, config.output_registers),
        )  # fmt: skip
    if not output_final_state:
        final_state = final_state.new_empty(0)
    return out, final_state, states


@compiled_together(_kernels)
def backward(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    out_gate_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    d_out: Tensor,
    d_final_state: Tensor | None,
    tau: float,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, gate logits, v, aug, out_gate, out_gate_bias and the initial state; empty for
    those that were None. Computes the factors again, and has the states from the forward pass."""
    with torch.cuda.device_of(q):
        call = _Call(
            q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale, norm_eps
        )
        config, chunks = call.config, (call.layout.chunk_count, call.heads)
        grid = (chunks[0] * chunks[1],)
        # float16 would overflow under loss scaling.
        d_y = call.outputs(*v.shape, dtype=call.dtype)
        d_out_gate = call.outputs(*(v.shape if out_gate is not None else (0,)))
        d_bias = call.empty(*((*chunks, call.width) if call.bias is not None else (0,)))
        launcher(output_backward, grid)(
            v, out_gate, call.bias, *call.shared(), states,
            d_out, d_y, d_out_gate, d_bias, *call.numbers(), norm_eps,
            *v.stride(), *call.gate_strides(), *d_out.stride(),
            **call.output_options(config.backward_warps, config.backward_registers),
        )  # fmt: skip
        d_states, d_initial = call.states(d_y, _boundary(d_final_state), reverse=True)
        tiles = triton.cdiv(call.k, config.gradient_k)
        d_q, d_gates = map(call.gradient_in, (call.early, call.late))
        # d_y is read for the last time where d_v is written, unless by several tiles of K.
        d_v = call.gradient_in(d_y) if tiles == 1 else call.outputs(*v.shape)
        d_aug = call.empty(*((*chunks, call.k) if aug is not None else (0,)))
        common = (
            states, d_states, d_q, d_gates, d_v, d_aug, *call.numbers(), call.scale,
            call.inverse_tau, *call.strides(),
        )  # fmt: skip
        options = dict(**call.widths(), V=call.width, HAS_AUG=aug is not None, PACKED=call.packed)
        if tiles > 1:
            launcher(value_gradients, grid)(
                v, d_y, call.early, call.late, call.exact, call.similarity,
                d_v, call.scores, call.similarity, d_states, *call.numbers(), *v.stride(),
                **options, BK=power_of_two(call.k), BV=config.value_v, STAGES=config.value_stages,
                num_warps=4, maxnreg=config.value_registers,
            )  # fmt: skip
        launcher(gradients, (grid[0] * tiles,))(
            q, gate_logits, v, call.aug, d_y, call.early, call.late, call.chunk_decays, call.exact,
            call.similarity, call.scores, call.similarity, *common, **options,
            BK=config.gradient_k, BV=config.gradient_v, STAGES=config.gradient_stages,
            num_warps=config.gradient_warps, maxnreg=config.gradient_registers,
        )  # fmt: skip
        launcher(exact_gradients, grid)(
            q, gate_logits, v, call.aug, d_y, *call.shared(), *common, **options,
            BV=min(32, power_of_two(call.width)), num_warps=4,
        )  # fmt: skip
        if aug is not None:
            d_aug = _sum(d_aug, aug.dtype)
        if out_gate_bias is not None:
            d_bias = _sum(d_bias, out_gate_bias.dtype)
    if initial_state is None:
        d_initial = d_initial.new_empty(0)
    return d_q, d_gates, d_v, d_aug, d_out_gate, d_bias, d_initial
