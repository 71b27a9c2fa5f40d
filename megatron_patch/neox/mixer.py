"""The tensor-parallel MetaLA token mixer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron import mpu
from torch import nn

from megatron_patch.architecture import QUERY_GATE_GAIN, Architecture
from megatron_patch.ops import meta_linear_attention, short_convolution

# (convolution state [B, d, W - 1], recurrent state [B, H, K, V]): all a layer keeps of the past.
MixerState = tuple[torch.Tensor, torch.Tensor]


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU over [B, T, d]; a module of its own so that ZeRO-3 sees
    its weight being used. Initialised as `torch.nn.Conv1d`, as in the authors' models.

    The weight is replicated over tensor-parallel ranks and stays identical there without any
    communication of its own: every rank initialises it from the random state they share, feeds it
    the same input, and gets the same output gradient, because the input projection that follows
    sums that gradient over the ranks (`copy_to_model_parallel_region`). Equal gradients, equal
    updates.
    """

    def __init__(self, channels: int, width: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, output_state: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return short_convolution(
            x,
            self.weight,
            activation="silu",
            initial_state=state,
            output_final_state=output_state,
        )


class ParallelMetaLAMixer(nn.Module):
    """MetaLA (arXiv 2411.10741) between the two residual streams, split by heads over the
    tensor-parallel ranks.

    One column-parallel projection without gathering gives, head by head, q (K), gate logits (K), v
    (V) and output gate (V), with K = expand_k d / H and V = d / H. A rank's share of its rows is
    therefore whole heads at any tensor-parallel degree, one all-reduce in the backward pass serves
    all four, and the operator reads the four where they lie. The output projection is row-parallel:
    one all-reduce in the forward pass.

    Parameters, full shapes and split: `conv1d.weight` [d, 1, W] replicated; `in_proj.weight`
    [2H(K + V), d], `out_gate_bias` [H, V] and `aug_balance` [H, K] along the first dimension;
    `out_proj.weight` [d, d] along the second.
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
        """A zero [H / tp, width] parameter, marked as GPT-NeoX marks what is split over ranks (its
        gradient clipping counts a parameter that is not marked once, not once a rank) and kept out
        of weight decay: one is a bias, the other a per-channel scale that starts at, and means,
        zero."""
        parameter = nn.Parameter(torch.zeros(self.num_heads, width, **factory))
        parameter.model_parallel = True
        parameter.partition_dim = 0
        parameter.stride = 1
        parameter._no_weight_decay = True
        return parameter

    def _authors_init(self, base: Callable) -> Callable:
        """`base` for v and output gate; Xavier-uniform with gain 2**-2.5 for q and gate logits,
        whose fans are those of the authors' separate [HK, d] matrices."""
        columns = self.key_width * self.num_heads * mpu.get_model_parallel_world_size()

        def init(weight: torch.Tensor) -> torch.Tensor:
            base(weight)
            hidden_size = weight.shape[1]
            bound = QUERY_GATE_GAIN * math.sqrt(6 / (hidden_size + columns))
            by_head = weight.data.view(-1, 2 * (self.key_width + self.value_width), hidden_size)
            by_head[:, : 2 * self.key_width].uniform_(-bound, bound)
            return weight

        return init

    def forward(
        self, x: torch.Tensor, past: MixerState | None = None, use_cache: bool = False
    ) -> tuple[torch.Tensor, MixerState | None]:
        """Mixes tokens.

        Args:
            x: [B, T, d], the normed residual stream, identical on all tensor-parallel ranks.
            past: what an earlier call with `use_cache` returned for the tokens before these.
            use_cache: whether to return the state after the last token.

        Returns:
            [B, T, d], identical on all ranks, and the state or `None`.
        """
        conv_state, state = past if past is not None else (None, None)
        x, conv_state = self.conv1d(x, conv_state, use_cache)
        projected, _ = self.in_proj(x)
        heads = projected.unflatten(-1, (self.num_heads, -1))
        q, gate_logits, v, out_gate = heads.split(
            [self.key_width, self.key_width, self.value_width, self.value_width], dim=-1
        )
        out, state = meta_linear_attention(
            q,
            gate_logits,
            v,
            self.aug_balance,
            out_gate,
            out_gate_bias=self.out_gate_bias,
            tau=self.options.tau,
            norm_eps=self.options.output_norm_eps,
            initial_state=state,
            output_final_state=use_cache,
            backend=self.options.backend,
        )
        output, _ = self.out_proj(out.flatten(-2))
        return output, (conv_state, state) if use_cache else None
