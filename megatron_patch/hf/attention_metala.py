"""Causal softmax attention, for the attention layers of a hybrid model.

Runs PyTorch's `scaled_dot_product_attention`, with grouped key-value heads if the configuration has
fewer of them, and rotary position embeddings (arXiv 2104.09864, channels paired by halves as in
GPT-NeoX and LLaMA) if it has any.

The model moves padding behind a call's tokens (see `modeling_metala`), where causality hides it
within the call. The cache remembers the columns that hold padding and later calls mask them.
Positions count tokens, not padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_metala import MetaLAConfig


class AttentionInputs(NamedTuple):
    """Inputs that all attention layers of a model call share. Each may be `None`.

    Attributes:
        mask: bool [B, 1, T, past + T], true where a query may see a key. `None` if causality alone
            decides, or a single token sees all keys.
        document_lengths: lengths of the documents packed along time.
        cos, sin: [B or 1, 1, T, rotary width] of the positions.
    """

    mask: torch.Tensor | None
    document_lengths: list[int] | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None


def attention_inputs(
    config: MetaLAConfig,
    hidden: torch.Tensor,
    past: int,
    key_padding: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> AttentionInputs:
    """Computes mask and positions of a model call.

    Args:
        config: the model's configuration.
        hidden: [B, T, D], the call's embeddings, for shape, device and dtype.
        past: number of columns that the cache has read.
        key_padding: padding of all columns including this call's, see `join_padding`.
        cu_seqlens: int [N + 1], boundaries of N documents packed along time (B = 1), or `None`.
    """
    time, device = hidden.shape[1], hidden.device
    columns = torch.arange(past, past + time, device=device)
    positions, document_lengths = columns[None], None
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        positions = (columns - cu_seqlens[:-1].repeat_interleave(lengths))[None]
        document_lengths = lengths.tolist()
    elif past and key_padding is not None:
        positions = positions - key_padding[:, :past].sum(1, keepdim=True)

    mask = None
    if past and (time > 1 or key_padding is not None):
        keys = torch.arange(past + time, device=device)
        mask = (keys <= columns[:, None])[None]
        if key_padding is not None:
            key_padding = F.pad(key_padding, (0, past + time - key_padding.shape[1]))
            # Padding sees itself, since softmax over no keys at all would give NaN.
            mask = mask & (~key_padding[:, None] | (keys == columns[:, None]))
        mask = mask[:, None]

    cos, sin = rotary_table(config, positions, hidden.dtype)
    return AttentionInputs(mask, document_lengths, cos, sin)


def join_padding(
    before: torch.Tensor | None, padding: torch.Tensor | None, past: int
) -> torch.Tensor | None:
    """Appends the padding of a call, bool [B, T] or `None`, to that of the `past` columns before
    it, bool [B, columns] or `None`. Returns bool [B, columns] up to the last call that had padding,
    or `None`."""
    if padding is None:
        return before
    if before is None:
        before = padding.new_zeros(padding.shape[0], 0)
    return torch.cat([F.pad(before, (0, past - before.shape[1])), padding], dim=1)


def rotary_table(
    config: MetaLAConfig, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns cos and sin [B, 1, T, rotary width] of the angles at positions [B, T].

    They are computed in float32 (float64 for float64) and rounded to `dtype`. `None` if the model
    has no position embeddings.
    """
    if config.rope_theta is None:
        return None, None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    width = config.rotary_dim
    channels = torch.arange(0, width, 2, device=positions.device).to(wide)
    angles = positions[:, None, :, None].to(wide) * (1.0 / config.rope_theta ** (channels / width))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` channels of x [B, H, T, width]."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated, rest], dim=-1)


class MetaLAAttention(nn.Module):
    """Causal softmax attention, used in place of `MetaLATokenMixer`."""

    def __init__(self, config: MetaLAConfig):
        super().__init__()
        dim, bias = config.decoder_embed_dim, config.attention_bias
        self.num_heads = config.decoder_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        key_value_dim = dim // self.num_heads * self.num_key_value_heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, key_value_dim, bias=bias)
        self.v_proj = nn.Linear(dim, key_value_dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        past_keys: torch.Tensor | None,
        past_values: torch.Tensor | None,
        inputs: AttentionInputs,
        output_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Mixes the tokens of each sequence.

        Args:
            x: [B, T, D].
            past_keys, past_values: [B, key-value heads, past, D / heads], or `None`.
            inputs: see `AttentionInputs`.
            output_state: whether to return keys and values of all tokens so far after the result
                [B, T, D], in place of twice `None`.
        """
        q = self._heads(self.q_proj(x), self.num_heads)
        keys = self._heads(self.k_proj(x), self.num_key_value_heads)
        values = self._heads(self.v_proj(x), self.num_key_value_heads)
        if inputs.cos is not None:
            q, keys = (rotate(y, inputs.cos, inputs.sin) for y in (q, keys))
        if past_keys is not None:
            keys = torch.cat([past_keys, keys], dim=2)
            values = torch.cat([past_values, values], dim=2)
        if inputs.document_lengths is None:
            out = self._attend(q, keys, values, inputs.mask)
        else:
            documents = (y.split(inputs.document_lengths, dim=2) for y in (q, keys, values))
            out = torch.cat([self._attend(*d, None) for d in zip(*documents, strict=True)], dim=2)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out, keys, values) if output_state else (out, None, None)

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Turns [B, T, heads * width] into [B, heads, T, width]."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attends from q [B, heads, T, width] to keys and values [B, key-value heads, S, width]."""
        groups = self.num_heads // self.num_key_value_heads
        if groups > 1 and q.shape[2] == 1:
            # Queries that share a key-value head go along time, so that no key is repeated.
            q = q.unflatten(1, (-1, groups)).flatten(2, 3)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return out.flatten(1, 2)[:, :, None]
        causal = mask is None and q.shape[2] == keys.shape[2]
        if groups > 1:
            keys, values = (y.repeat_interleave(groups, dim=1) for y in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
