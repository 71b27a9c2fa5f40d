"""The tensor-parallel MetaLA token mixer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron import mpu
from torch import nn

from megatron_patch.architecture import QUERY_GATE_GAIN, Architecture
from megatron_patch.neox.recompute import Compute, ForTwo, Rerun, recomputed
from megatron_patch.neox.token_groups import context_group, is_sequence_parallel
from megatron_patch.ops import meta_linear_attention, short_convolution
from megatron_patch.ops.context_parallel import ContextParallel, incoming_rows
from megatron_patch.ops.joined import split_joined

# What a layer keeps of earlier tokens: the convolution's inputs [b, h, W - 1] and the recurrent
# state [b, H, K, V].
MixerState = tuple[torch.Tensor, torch.Tensor]


class ShortConvolution(nn.Module):
    """Causal depthwise convolution of width W, then SiLU, over [b, s, h].

    The weight [h, 1, W] is initialised like `torch.nn.Conv1d`, as in the authors' models. It is
    replicated over the tensor-parallel ranks and needs no communication to stay identical there:
    all ranks initialise it from the same random state, feed it the same input, and get the same
    output gradient, because the input projection that follows sums that gradient over the ranks
    (`copy_to_model_parallel_region`). With sequence parallelism that sum comes after the
    convolution, so the weight's gradient is summed too (`sequence_parallel.py`).

    It is a module of its own because ZeRO 3 gathers parameters in the hooks of modules.
    """

    def __init__(self, channels: int, width: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None,
        output_state: bool,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return short_convolution(
            x,
            self.weight,
            activation="silu",
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )


class ParallelMetaLAMixer(nn.Module):
    """The MetaLA token mixer (arXiv 2411.10741), split by heads over the tensor-parallel ranks.

    With h the hidden size, H heads, K = expand_k h / H and V = h / H, each head has a query q (K),
    gate logits (K), a value v (V) and an output gate (V). One column-parallel projection computes
    all four, its rows ordered head by head (q, gate logits, v and output gate of head 0, then of
    head 1, ...). Three things follow:

    - a plain split of the rows gives each rank whole heads, at any tensor-parallel degree;
    - one matrix product serves all four, and the backward pass all-reduces the gradient of the
      input once instead of four times;
    - the operator reads the four as strided slices of the product, without copies.

    The output projection is row-parallel, with one all-reduce in the forward pass.

    Parameters with their full shapes: `conv1d.weight` [h, 1, W], replicated; `in_proj.weight`
    [2H(K + V), h], `out_gate_bias` [H, V] and `aug_balance` [H, K], split along the first
    dimension; `out_proj.weight` [h, h], split along the second.
    """

    def __init__(
        self,
        neox_args,
        model: Architecture,
        init_method: Callable[[torch.Tensor], object],
        output_layer_init_method: Callable[[torch.Tensor], object],
    ):
        super().__init__()
        hidden_size = model.hidden_size
        self.options = model.metala
        self.is_split = is_sequence_parallel(neox_args)
        self.num_heads = mpu.divide(model.num_heads, mpu.get_model_parallel_world_size())
        self.key_width, self.value_width = model.key_width, model.value_width

        device = "cpu" if neox_args.use_cpu_initialization else torch.cuda.current_device()
        factory = {"device": device, "dtype": neox_args.params_dtype}
        self.conv1d = ShortConvolution(hidden_size, self.options.conv_width, **factory)
        self.in_proj = mpu.ColumnParallelLinear(
            neox_args=neox_args,
            input_size=hidden_size,
            output_size=2 * model.num_heads * (model.key_width + model.value_width),
            gather_output=False,
            init_method=self._authors_init(init_method)
            if self.options.init == "authors"
            else init_method,
            bias=False,
        )
        self.out_gate_bias = self._parameter_by_heads(self.value_width, factory)
        if self.options.self_augmentation:
            self.aug_balance = self._parameter_by_heads(self.key_width, factory)
        else:
            self.register_parameter("aug_balance", None)
        self.out_proj = mpu.RowParallelLinear(
            neox_args=neox_args,
            input_size=hidden_size,
            output_size=hidden_size,
            input_is_parallel=True,
            init_method=output_layer_init_method,
            bias=False,
        )

    def _parameter_by_heads(self, width: int, factory: dict) -> nn.Parameter:
        """Returns a zero parameter [H / tp, width] that is split over ranks and does not decay.

        Gradient clipping counts only marked parameters on every rank. Neither of the two uses may
        decay: one is a bias, the other a per-channel scale that starts at zero.
        """
        parameter = nn.Parameter(torch.zeros(self.num_heads, width, **factory))
        parameter.model_parallel = True
        parameter.partition_dim = 0
        parameter.stride = 1
        parameter._no_weight_decay = True
        return parameter

    def _authors_init(self, base: Callable) -> Callable:
        """Returns the authors' initialiser of `in_proj`: `base` for v and the output gate,
        Xavier-uniform with gain 2**-2.5 for q and the gate logits. Its fans are those of the
        authors' separate matrices [HK, h]."""
        columns = self.key_width * self.num_heads * mpu.get_model_parallel_world_size()
        key_width, value_width = self.key_width, self.value_width  # `in_proj` will hold `init`

        def init(weight: torch.Tensor) -> torch.Tensor:
            base(weight)
            hidden_size = weight.shape[1]
            bound = QUERY_GATE_GAIN * math.sqrt(6 / (hidden_size + columns))
            by_head = weight.data.view(-1, 2 * (key_width + value_width), hidden_size)
            by_head[:, : 2 * key_width].uniform_(-bound, bound)
            return weight

        return init

    def forward(
        self,
        x: torch.Tensor,
        past: MixerState | None = None,
        use_cache: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        again: Compute | None = None,
    ) -> tuple[torch.Tensor, MixerState | None]:
        """Mixes tokens.

        Args:
            x: normed hidden states [b, s, h], identical on all tensor-parallel ranks. With sequence
                parallelism [s / tp, b, h], this rank's tokens.
            past: the state that an earlier call returned for the tokens before these.
            use_cache: whether to return the state after the last token.
            cu_seqlens: int32 [N + 1], the boundaries of N documents in the b rows laid end to end,
                for which nothing is carried over; `None` where each row is one document. Not
                together with `past` or `use_cache`. With context parallelism the first documents go
                on from the rank before (`ops/context_parallel.py`). With sequence parallelism they
                are the boundaries of the gathered tokens.
            again: computes x again; without it x, or all gathered tokens, are kept for the backward
                pass.

        Returns:
            The output, shaped and split as x, and the state, or `None` without `use_cache`.
        """
        conv_past, state = past if past is not None else (None, None)
        is_packed = cu_seqlens is not None  # the operators take packed sequences in a batch of one
        recompute = self.options.recompute
        if self.is_split:
            x, again = self._gather(x, again, is_packed)
        rows, group = len(x), context_group()
        if group is not None:
            conv_past = incoming_rows(x, self.options.conv_width - 1, group, cu_seqlens)

        def convolve(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            if is_packed:
                x = x.reshape(1, -1, x.shape[-1])
            x, last = self.conv1d(x, conv_past, use_cache, cu_seqlens)
            if is_packed:
                x = x.view(rows, -1, x.shape[-1])
            return x.contiguous(), last

        convolve_again = None
        if again is not None and (recompute == "most" or self.is_split):
            normed = again = ForTwo(again)  # the convolution asks, and then its backward pass

            def convolve_again() -> torch.Tensor:
                return convolve(normed())[0]

        with recomputed(x, again):
            x, conv_state = convolve(x)
        with recomputed(x, convolve_again):
            # With sequence parallelism `in_proj` would gather tokens.
            projected = F.linear(x, self.in_proj.weight) if self.is_split else self.in_proj(x)[0]
        heads = projected.unflatten(-1, (self.num_heads, -1))
        if is_packed:
            heads = heads.flatten(0, 1)[None]
        q, gate_logits, v, out_gate = split_joined(
            heads, [self.key_width, self.key_width, self.value_width, self.value_width]
        )
        operate = Rerun(
            partial(self._operate, rows, use_cache, cu_seqlens),
            (q, gate_logits, v, self.aug_balance, out_gate, self.out_gate_bias, state),
            is_on=recompute == "most",
        )
        out, state = operate.first()
        with recomputed(out, operate.again if recompute == "most" else None, self.out_proj.weight):
            output, _ = self.out_proj(out)
        return output, (conv_state, state) if use_cache else None

    @staticmethod
    def _gather(
        x: torch.Tensor, again: Compute | None, is_packed: bool
    ) -> tuple[torch.Tensor, Compute | None]:
        """Returns the tokens of all tensor-parallel ranks, [b, s, h] of [s / tp, b, h], and what
        gathers them again.

        They are gathered before the convolution, not behind it: a rank then reads nothing of its
        neighbour, and from here on everything is in the order of the operator.
        """

        def gather(x: torch.Tensor) -> torch.Tensor:
            x = mpu.gather_from_sequence_parallel_region(x).transpose(0, 1)
            return x.contiguous() if is_packed else x

        return gather(x), None if again is None else lambda: gather(again())

    def _operate(
        self,
        rows: int,
        output_final_state: bool,
        cu_seqlens: torch.Tensor | None,
        q: torch.Tensor,
        gate_logits: torch.Tensor,
        v: torch.Tensor,
        aug: torch.Tensor | None,
        out_gate: torch.Tensor,
        out_gate_bias: torch.Tensor,
        initial_state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the operator's output for b rows, its heads side by side, and its final state."""
        group = context_group()
        out, state = meta_linear_attention(
            q,
            gate_logits,
            v,
            aug,
            out_gate,
            out_gate_bias=out_gate_bias,
            tau=self.options.tau,
            norm_eps=self.options.output_norm_eps,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            context=None if group is None else ContextParallel(group, rows),
            backend=self.options.backend,
        )
        out = out.flatten(-2).view(rows, -1, self.num_heads * self.value_width)
        return (out.transpose(0, 1) if self.is_split else out).contiguous(), state
