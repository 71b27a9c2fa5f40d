"""The layers of MetaLA models: norms, token mixer, channel mixer and the block that joins them.

Module and parameter names are those of the authors' released checkpoints. A layer is a pure
function of its inputs and states, so that neither autograd nor gradient checkpointing notices the
cache. With `overwrite_state` it writes its new states over the old ones instead, for decoding
without new memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

try:  # transformers 4.53 and later
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:

    class GradientCheckpointingLayer(nn.Module):
        """A layer that the backward pass recomputes if gradient checkpointing is on."""

        gradient_checkpointing = False

        def __call__(self, *args: Any) -> Any:
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(super().__call__, *args)
            return super().__call__(*args)


from .attention_metala import MetaLAAttention
from .configuration_metala import MetaLAConfig
from .ops_metala import meta_linear_attention, short_convolution, swiglu

# The sigmoid of this gate logit is 1 in every float type: the decay is 1 and the key 1 - 1 = 0.
OPEN_GATE_LOGIT = 1e4


class MetaLARMSNorm(nn.Module):
    """RMS norm over the last dimension, x / sqrt(mean(x^2) + eps), in float32 or wider. The output
    has the dtype of x. "simplermsnorm" has no parameters, "rmsnorm" multiplies by `weight`
    [dim]."""

    no_weight_decay = ("weight",)

    def __init__(self, dim: int, norm_type: str, eps: float):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if norm_type == "rmsnorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        return F.rms_norm(wide, (self.dim,), weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, weight={self.weight is not None}"


class MetaLALayerNorm(nn.LayerNorm):
    """LayerNorm whose output has the dtype of x, under autocast too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


def make_norm(config: MetaLAConfig) -> nn.Module:
    """Returns the norm over the model's width that `config.norm_type` names."""
    if config.norm_type == "layernorm":
        return MetaLALayerNorm(config.decoder_embed_dim, eps=config.norm_eps)
    return MetaLARMSNorm(config.decoder_embed_dim, config.norm_type, config.norm_eps)


class MetaLAShortConvolution(nn.Module):
    """Causal depthwise convolution along time, followed by SiLU. The weight is [dim, 1,
    kernel_size].

    The module reads its weight in its own forward, so that ZeRO-3, FSDP and offloading gather it in
    time. It is no `nn.Conv1d`: PEFT would then give it an adapter that cannot take its state.
    """

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, kernel_size={self.weight.shape[-1]}"

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        output_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        overwrite_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps x [B, T, D] and state [B, D, W - 1] to y [B, T, D] and the state after x."""
        return short_convolution(
            x,
            self.weight,
            activation="silu",
            initial_state=None if state is None else state.to(x.dtype),
            output_final_state=output_state,
            inplace_final_state=overwrite_state,
            cu_seqlens=cu_seqlens,
        )


def convolution_state_at(
    x: torch.Tensor, state: torch.Tensor | None, lengths: torch.Tensor, kernel_size: int
) -> torch.Tensor:
    """Returns the state of the short convolution, [B, D, W - 1], after the first `lengths` tokens
    (int64 [B], 0 to T) of each row of x [B, T, D]. `state` is that before x, or `None` for
    zeros."""
    past = kernel_size - 1
    if past == 0:
        return x.new_empty(len(x), x.shape[-1], 0)
    # Positions in x of the last W - 1 inputs. Negative ones lie in the state before x.
    index = lengths[:, None] - past + torch.arange(past, device=x.device)
    channels = x.shape[-1]
    recent = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels)).transpose(1, 2)
    if state is None:
        before = torch.zeros_like(recent)
    else:
        older = (index + past).clamp(max=past - 1)[:, None].expand(-1, channels, -1)
        before = state.to(x.dtype).gather(2, older)
    return torch.where((index >= 0)[:, None], recent, before).contiguous()


class MetaLATokenMixer(nn.Module):
    """Short convolution, four projections, Meta Linear Attention and the output projection."""

    # One scale per channel. Like a bias, it goes without weight decay.
    no_weight_decay = ("aug_balance",)

    def __init__(self, config: MetaLAConfig):
        super().__init__()
        dim = config.decoder_embed_dim
        self.num_heads = config.decoder_attention_heads
        self.tau = float(config.tau)
        self.scale = config.head_key_dim**-0.5
        self.norm_eps = float(config.output_norm_eps)
        self.kernel_size = config.conv_width

        columns = config.decoder_attention_heads * config.head_key_dim
        self.q_proj = nn.Linear(dim, columns, bias=False)
        self.k_gate = nn.Linear(dim, columns, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=True)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.aug_balance = nn.Parameter(torch.zeros(columns)) if config.self_augmentation else None
        self.conv1d = MetaLAShortConvolution(dim, config.conv_width)
        # For `_init_weights`, which sees one module at a time.
        self.q_proj._is_query_or_gate = self.k_gate._is_query_or_gate = True

    def forward(
        self,
        x: torch.Tensor,
        conv_state: torch.Tensor | None,
        recurrent_state: torch.Tensor | None,
        padding: torch.Tensor | None,
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        output_state: bool,
        overwrite_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Mixes the tokens of each sequence. Returns [B, T, D], and the two new states or `None`.

        Args:
            x: [B, T, D].
            conv_state: [B, D, W - 1], the inputs before x, or `None`.
            recurrent_state: [B, H, K, V] float32, or `None`.
            padding: bool [B, T], true behind each row's tokens; `None` without padding.
            lengths: int64 [B], the number of tokens in each row. Given with `padding`, unless
                `cu_seqlens` is given.
            cu_seqlens: int32 [N + 1] for N sequences packed along time (B = 1), or `None`.
            output_state: whether to return the states after the last token.
            overwrite_state: whether to write these over the given states. Needs `output_state`, and
                gradients switched off.
        """
        inputs, padded = x, lengths is not None
        x, new_conv_state = self.conv1d(
            x, conv_state, output_state and not padded, cu_seqlens, overwrite_state and not padded
        )
        if output_state and padded:
            new_conv_state = convolution_state_at(inputs, conv_state, lengths, self.kernel_size)
            if overwrite_state:
                new_conv_state = conv_state.copy_(new_conv_state)

        q, gate_logits = self._heads(self.q_proj(x)), self._heads(self.k_gate(x))
        if padding is not None:
            gate_logits = gate_logits.masked_fill(padding[..., None, None], OPEN_GATE_LOGIT)
        aug = None if self.aug_balance is None else self.aug_balance.view(self.num_heads, -1)
        out, new_recurrent_state = meta_linear_attention(
            q,
            gate_logits,
            self._heads(self.v_proj(x)),
            aug,
            self._heads(self.g_proj(x)),
            tau=self.tau,
            scale=self.scale,
            norm_eps=self.norm_eps,
            initial_state=recurrent_state,
            output_final_state=output_state,
            inplace_final_state=overwrite_state,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(out.flatten(2)), new_conv_state, new_recurrent_state

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Views [B, T, H * width] as [B, T, H, width]."""
        return x.unflatten(-1, (self.num_heads, -1))


class MetaLAChannelMixer(nn.Module):
    """SwiGLU: l3(silu(l1 x) * l2 x)."""

    def __init__(self, dim: int, width: int, bias: bool):
        super().__init__()
        self.l1 = nn.Linear(dim, width, bias=bias)
        self.l2 = nn.Linear(dim, width, bias=bias)
        self.l3 = nn.Linear(width, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l3(swiglu(self.l1(x), self.l2(x)))


class MetaLADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + token_mixer(norm(x)), then x + channel_mixer(norm(x)).

    The token mixer is MetaLA, or softmax attention in the attention layers of a hybrid.
    """

    def __init__(self, config: MetaLAConfig, layer_idx: int):
        super().__init__()
        dim = config.decoder_embed_dim
        self.is_attention = config.is_attention(layer_idx)
        mixer, width, bias = MetaLATokenMixer, config.glu_dim, config.bias
        if self.is_attention:
            mixer, width = MetaLAAttention, config.attention_glu_dim
            bias = config.attention_glu_bias
        self.token_norm = make_norm(config)
        self.token_mixer = mixer(config)
        self.channel_norm = make_norm(config)
        self.channel_mixer = MetaLAChannelMixer(dim, width, bias)

    def forward(
        self, x: torch.Tensor, *mixer_arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Maps x [B, T, D], and what the token mixer takes after it (two states first), to [B, T,
        D] and the two new states or `None`."""
        mixed, *states = self.token_mixer(self.token_norm(x), *mixer_arguments)
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), *states
