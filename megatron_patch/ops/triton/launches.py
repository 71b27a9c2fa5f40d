"""Forward and backward of MetaLA as sequences of kernel launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_patch.ops.backends import import_failure, say
from megatron_patch.ops.triton.compilation import compiled_together, is_compiling, launcher
from megatron_patch.ops.triton.configuration import Configuration, configure, power_of_two
from megatron_patch.ops.triton.exact import exact_gradients
from megatron_patch.ops.triton.factors import factors
from megatron_patch.ops.triton.gradients import gradients, value_gradients
from megatron_patch.ops.triton.layout import Layout, lay_out
from megatron_patch.ops.triton.output import output, output_backward
from megatron_patch.ops.triton.shares import sum_shares
from megatron_patch.ops.triton.states import carry, scan

CUDA_FAILURE = import_failure("megatron_patch.ops.hopper.launch")
if CUDA_FAILURE is None:
    from megatron_patch.ops.hopper import chunk_bwd as cuda_gradients
    from megatron_patch.ops.hopper import chunk_fwd_o as cuda_output
elif torch.cuda.is_available():
    say(
        f"MetaLA: the package cuda-bindings {CUDA_FAILURE}: on Hopper, kernels in Triton take the "
        "place of those in CUDA C++"
    )

EXACT_PROGRAMS = 256  # of the kernel for exact chunks; two fit a multiprocessor


class Factors(NamedTuple):
    """What the kernel `factors` writes, but for scores."""

    early: Tensor
    late: Tensor
    chunk_decays: Tensor
    exact: Tensor
    similarity: Tensor


class _Call:
    """One call's tensors and numbers, and the launches that its two passes share."""

    def __init__(self, q, gate_logits, v, aug, out_gate, bias, cu_seqlens, tau, scale):
        self.q, self.gates, self.v, self.out_gate = q, gate_logits, v, out_gate
        self.aug = None if aug is None else aug.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.batch, self.time, self.heads, self.k = q.shape
        self.width = v.shape[-1]
        self.scale, self.inverse_tau = scale, 1.0 / tau
        self.config: Configuration = configure(self.k, self.width, q.dtype)
        self.bounds = cu_seqlens
        self.packed = cu_seqlens is not None
        self.layout: Layout = lay_out(
            self.batch, self.time, self.config.chunk, self.config.segment, cu_seqlens
        )
        self.dtype = self.config.dtype

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def outputs(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """What callers receive: zeros in rows that no packed sequence covers."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    def widths(self, precision: str | None = None) -> dict:
        return dict(
            H=self.heads, K=self.k, C=self.config.chunk,
            PRECISION=precision or self.config.precision,
        )  # fmt: skip

    def scores(self) -> Tensor:
        """Memory for scores, or their gradients."""
        shape = (self.batch, self.time, self.heads, self.config.chunk)
        return self.empty(*shape, dtype=self.dtype)

    def factors(self) -> tuple[Factors, Tensor]:
        """The factors, and the scores of exact chunks."""
        layout, config, heads = self.layout, self.config, self.heads
        shape = (self.batch, self.time, heads)
        found = Factors(
            # `outputs`, for gradients take their place.
            early=self.outputs(*shape, self.k, dtype=self.dtype),
            late=self.outputs(*shape, self.k, dtype=self.dtype),
            chunk_decays=self.empty(layout.chunk_count, heads, self.k),
            exact=self.empty(layout.chunk_count, heads, dtype=torch.int32),
            similarity=self.empty(*(shape if self.aug is not None else (0,))),
        )
        scores = self.scores()
        launcher(factors, (layout.chunk_count * heads,))(
            self.q, self.gates, self.aug, found.early, found.late, found.chunk_decays, found.exact,
            scores, found.similarity, layout.chunk_table, self.bounds,
            self.time, layout.chunks, self.scale, self.inverse_tau,
            *self.q.stride(), *self.gates.stride(),
            **self.widths(), BK=power_of_two(self.k), RUN=config.factor_run,
            HAS_AUG=self.aug is not None, PACKED=self.packed, num_warps=config.factor_warps,
        )  # fmt: skip
        return found, scores

    def states(
        self, found: Factors, y: Tensor, boundary: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
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
                found.early if reverse else found.late, y, found.chunk_decays, found.exact,
                states, entering, leaving, decays, layout.segment_table,
                layout.chunk_bounds, self.bounds, self.time, layout.segments, layout.chunks,
                *y.stride(),
                **self.widths(config.full_precision), V=width, BK=config.carry_k, BV=config.carry_v,
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

    def numbers(self) -> tuple:
        return self.layout.chunk_table, self.bounds, self.time, self.layout.chunks

    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride(), *self.gates.stride(), *self.v.stride())

    def gate_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.out_gate is None else self.out_gate.stride()

    def gate_options(self) -> dict:
        return dict(
            V=self.width,
            BV=self.config.output_v,
            HAS_GATE=self.out_gate is not None,
            HAS_BIAS=self.bias is not None,
            PACKED=self.packed,
        )


def _sum(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the chunks' shares [chunks, H, W] in a fixed order."""
    rows, width = shares.shape[0], shares.shape[1] * shares.shape[2]
    total = torch.empty(shares.shape[1:], dtype=dtype, device=shares.device)
    launcher(sum_shares, (triton.cdiv(width, 32),))(shares, total, rows, width, num_warps=8)
    return total


def _boundary(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()


def _kernels(q: Tensor, gate_logits: Tensor, v: Tensor, *others: object) -> tuple:
    """What decides which kernels a pass launches, but for strides and addresses, to which Triton
    specialises them."""
    _, time, heads, k = q.shape
    width = v.shape[3]
    many_segments = time > configure(k, width, q.dtype).segment
    kinds = [x if isinstance(x, bool) else x is None for x in others]
    return q.device, q.dtype, heads, k, width, many_segments, *kinds


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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, and what `backward` has: the states before each chunk, LayerNorm(y),
    1 / its standard deviation, and the five `Factors`. Empty is the final state where it is not
    asked for, and what is not to be kept."""
    with torch.cuda.device_of(q):
        call = _Call(q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale)
        config = call.config
        found, scores = call.factors()
        states, final_state = call.states(found, v, _boundary(initial_state), reverse=False)
        out = call.outputs(*v.shape)
        normalised = inverse_std = None
        if keep:
            # `outputs`, for gradients take their place.
            normalised = call.outputs(*v.shape, dtype=call.dtype)
            inverse_std = call.empty(*v.shape[:3])
        grid = (call.layout.chunk_count * call.heads,)
        if CUDA_FAILURE is None and cuda_output.fits(q, v, out_gate, call.bias, config.chunk):
            kernel = cuda_output.kernel(q, v, aug, out_gate, call.bias, call.bounds, keep)
            if not is_compiling():
                cuda_output.launch(
                    kernel, call.k, grid[0],
                    (
                        v, out_gate, call.bias, found.early, found.late, found.exact, scores,
                        found.similarity, states, out, normalised, inverse_std,
                        call.layout.chunk_table, call.bounds,
                    ),
                    (
                        call.time, call.layout.chunks, *v.stride()[:3], *call.gate_strides()[:3],
                    ),
                    (norm_eps,),
                )  # fmt: skip
        else:
            launcher(output, grid)(
                v, out_gate, call.bias, found.early, found.late, found.exact, scores,
                found.similarity, states, out, normalised, inverse_std,
                *call.numbers(), norm_eps, *v.stride(), *call.gate_strides(),
                **call.widths(), **call.gate_options(), BK=config.output_k,
                HAS_AUG=aug is not None,
                num_warps=config.output_warps, maxnreg=config.output_registers,
            )  # fmt: skip
    if not output_final_state:
        final_state = q.new_empty(0, dtype=torch.float32)
    if keep:
        kept = (states, normalised, inverse_std, *found)
        if is_compiling():  # the other half of a training, whose kernels take longest
            backward(
                q, gate_logits, v, aug, out_gate, out_gate_bias, initial_state, cu_seqlens,
                *kept, torch.empty_like(out), None, tau, scale, True,
            )  # fmt: skip
        return out, final_state, *kept
    return out, final_state, *[q.new_empty(0) for _ in range(8)]


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
    normalised: Tensor,
    inverse_std: Tensor,
    early: Tensor,
    late: Tensor,
    chunk_decays: Tensor,
    exact: Tensor,
    similarity: Tensor,
    d_out: Tensor,
    d_final_state: Tensor | None,
    tau: float,
    scale: float,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, gate logits, v, aug, out_gate, out_gate_bias and the initial state; empty for
    those that were None. With `overwrite`, gradients may take the memory of `normalised`, `early`
    and `late`, which nobody reads afterwards."""
    with torch.cuda.device_of(q):
        call = _Call(q, gate_logits, v, aug, out_gate, out_gate_bias, cu_seqlens, tau, scale)
        config, chunks = call.config, (call.layout.chunk_count, call.heads)
        grid = (chunks[0] * chunks[1],)
        # Not in float16, which would overflow under loss scaling.
        d_y = normalised if overwrite else call.outputs(*v.shape, dtype=call.dtype)
        d_out_gate = call.outputs(*(v.shape if out_gate is not None else (0,)))
        d_bias = call.empty(*((*chunks, call.width) if call.bias is not None else (0,)))
        launcher(output_backward, grid)(
            normalised, inverse_std, out_gate, call.bias, d_out, d_y, d_out_gate, d_bias,
            *call.numbers(), *call.gate_strides(), *d_out.stride(),
            H=call.heads, C=config.chunk, ROWS=config.backward_rows, **call.gate_options(),
            num_warps=config.backward_warps,
        )  # fmt: skip
        found = Factors(early, late, chunk_decays, exact, similarity)
        d_states, d_initial = call.states(found, d_y, _boundary(d_final_state), reverse=True)
        in_cuda = CUDA_FAILURE is None and cuda_gradients.fits(q, gate_logits, v, aug, config.chunk)
        tiles = 1 if in_cuda else triton.cdiv(call.k, config.gradient_k)

        def gradient_in(memory: Tensor, is_free: bool) -> Tensor:
            """Where a gradient goes: into what its kernel reads for the last time, if it fits."""
            free = is_free and memory.dtype == q.dtype
            return memory if free else call.outputs(*memory.shape)

        d_q, d_gates = gradient_in(early, overwrite), gradient_in(late, overwrite)
        # Several tiles of K read d_y after d_v has been written.
        d_v = gradient_in(d_y, tiles == 1)
        d_aug = call.empty(*((*chunks, call.k) if aug is not None else (0,)))
        results = (states, d_states, d_q, d_gates, d_v, d_aug, *call.numbers())
        numbers = (call.scale, call.inverse_tau, *call.strides())
        options = dict(V=call.width, HAS_AUG=aug is not None, PACKED=call.packed)
        d_scores = d_similarity = None
        if tiles > 1:
            d_scores, d_similarity = call.scores(), torch.empty_like(similarity)
            launcher(value_gradients, grid)(
                v, d_y, early, late, exact, similarity,
                d_v, d_scores, d_similarity, d_states, *call.numbers(), *v.stride(),
                **call.widths(config.full_precision), **options, BK=power_of_two(call.k),
                BV=config.value_v, STAGES=config.value_stages,
                num_warps=4, maxnreg=config.value_registers,
            )  # fmt: skip
        if in_cuda:
            kernel = cuda_gradients.kernel(q, v, aug, call.bounds)
            if not is_compiling():
                cuda_gradients.launch(
                    kernel, grid[0],
                    (
                        q, gate_logits, v, call.aug, d_y, early, late, chunk_decays, exact,
                        similarity, states, d_states, d_q, d_gates, d_v, d_aug,
                        call.layout.chunk_table, call.bounds,
                    ),
                    (
                        call.time, call.layout.chunks,
                        *q.stride()[:3], *gate_logits.stride()[:3], *v.stride()[:3],
                    ),
                    (call.scale, call.inverse_tau),
                )  # fmt: skip
        else:
            launcher(gradients, (grid[0] * tiles,))(
                q, gate_logits, v, call.aug, d_y, early, late, chunk_decays, exact,
                similarity, d_scores, d_similarity, *results, *numbers, **call.widths(), **options,
                BK=config.gradient_k, BV=config.gradient_v, STAGES=config.gradient_stages,
                num_warps=config.gradient_warps, maxnreg=config.gradient_registers,
            )  # fmt: skip
        programs = min(grid[0], EXACT_PROGRAMS)
        launcher(exact_gradients, (programs,))(
            q, gate_logits, v, call.aug, d_y, early, late, exact, similarity,
            call.empty(programs, config.chunk, config.chunk, dtype=call.dtype),
            *results, grid[0], *numbers, **call.widths(), **options,
            BV=min(32, power_of_two(call.width)), num_warps=4,
        )  # fmt: skip
        if aug is not None:
            d_aug = _sum(d_aug, aug.dtype)
        if out_gate_bias is not None:
            d_bias = _sum(d_bias, out_gate_bias.dtype)
    if initial_state is None:
        d_initial = d_initial.new_empty(0)
    return d_q, d_gates, d_v, d_aug, d_out_gate, d_bias, d_initial
