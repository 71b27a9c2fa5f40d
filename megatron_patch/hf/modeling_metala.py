"""MetaLA language models (Meta Linear Attention, arXiv 2411.10741) for Hugging Face transformers.

Module and parameter names are those of the authors' released checkpoints. A MetaLA layer has no
positions and no attention: a token's state is all that the tokens before it leave behind. That
decides how batches work, and the attention layers of a hybrid follow it (`attention_metala`):

- Padding. Where a mask marks padding, each row's tokens are moved to its start for the time of the
  call, so that the convolution never meets a gap. Behind them the gate is held fully open (decay 1,
  key 0), which leaves the recurrent state untouched, and the convolution's state is taken at the
  row's last token. A row's results and state are those of the same row without padding, wherever
  the padding was, at any batch size, with or without a cache. Padding behind a row's last token
  gives what that token gives, so that a batch's last column is where each row goes on.
- Packed sequences. `cu_seqlens`, `position_ids` that restart, `seq_idx` or numbers in the mask
  separate documents (`documents_metala`); nothing crosses.
- Cache. `MetaLACache` holds the state, and keys and values of attention layers; a call with it
  continues with one token or many. Where gradients are on, layers are pure functions of inputs and
  states, so that the cache neither disturbs autograd nor gradient checkpointing; where they are
  off, new states are written over the old ones.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import trainer_pt_utils
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

try:  # transformers 5: initialisers that leave weights from a checkpoint alone
    from transformers import initialization as init
except ImportError:
    from torch.nn import init
try:  # transformers 4.53 and later
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:

    class GradientCheckpointingLayer(nn.Module):
        """A layer that is recomputed in the backward pass where the model is told to."""

        gradient_checkpointing = False

        def __call__(self, *args: Any) -> Any:
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(super().__call__, *args)
            return super().__call__(*args)


from .architecture_metala import QUERY_GATE_GAIN
from .attention_metala import MetaLAAttention, attention_inputs, join_padding
from .cache_metala import MetaLACache
from .configuration_metala import MetaLAConfig
from .decoding_metala import know_class, know_code, replay_step, take_back
from .documents_metala import (
    BOUNDARY_ARGUMENTS,
    boundaries,
    check_arguments,
    demand,
    document_starts,
    read_boundaries,
    read_mask,
    tokens_first,
)
from .ops_metala import meta_linear_attention, short_convolution, swiglu

# A gate logit whose sigmoid is 1 in every float type: log decay 0, so decay 1 and key 1 - 1 = 0.
OPEN_GATE_LOGIT = 1e4


class MetaLARMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 (float64 for float64 inputs).

    "simplermsnorm" has no parameters; "rmsnorm" multiplies by `weight` [dim]. x keeps its dtype.
    """

    not_decayed = ("weight",)

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
    """LayerNorm with weight and bias; x keeps its dtype, also under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


def make_norm(config: MetaLAConfig) -> nn.Module:
    """The norm over the model's width that `norm_type` names."""
    if config.norm_type == "layernorm":
        return MetaLALayerNorm(config.decoder_embed_dim, eps=config.norm_eps)
    return MetaLARMSNorm(config.decoder_embed_dim, config.norm_type, config.norm_eps)


class MetaLAShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU along time; the weight is [dim, 1, width].

    The weight is read in this module's own forward, so that ZeRO-3, FSDP and offloading gather it
    in time. No `nn.Conv1d`, since it has other inputs and a state: PEFT would take it for one and
    give it an adapter that cannot run, where it now says that it knows none.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, width={self.weight.shape[-1]}"

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        output_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        overwrite_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] and state [B, D, W - 1] to y [B, T, D] and the state after the last token."""
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
    x: torch.Tensor, state: torch.Tensor | None, lengths: torch.Tensor, width: int
) -> torch.Tensor:
    """The convolution's state after the first `lengths` tokens of each row, [B, D, W - 1].

    Args:
        x: [B, T, D], of which row b counts up to lengths[b].
        state: [B, D, W - 1], the inputs before x, or `None` for zeros.
        lengths: int64 [B], 0 to T.
        width: W.
    """
    past = width - 1
    if past == 0:
        return x.new_empty(len(x), x.shape[-1], 0)
    # Positions in x of the last W - 1 inputs; negative ones lie in the state before.
    index = lengths[:, None] - past + torch.arange(past, device=x.device)
    channels = x.shape[-1]
    recent = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels)).transpose(1, 2)
    if state is None:
        before = torch.zeros_like(recent)
    else:
        older = (index + past).clamp(max=past - 1)[:, None].expand(-1, channels, -1)
        before = state.to(x.dtype).gather(2, older)
    return torch.where((index >= 0)[:, None], recent, before).contiguous()


def may_overwrite(*states: torch.Tensor | None) -> bool:
    """Whether new states may be written over these: no gradient may need the old ones, and
    `inference_mode` protects those made under it."""
    return not torch.is_grad_enabled() and all(
        state is not None
        and not state.requires_grad
        and (torch.is_inference_mode_enabled() or not state.is_inference())
        for state in states
    )


def apart(state: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of a state for or from what autograd records, which may keep it for the gradients of
    others, while the cache's own is written over; the state itself where that cannot be."""
    if state is None or state.requires_grad or not torch.is_grad_enabled():
        return state
    return state.clone()


class MetaLATokenMixer(nn.Module):
    """Convolution, projections and Meta Linear Attention over time."""

    # One scale a channel, whose zero has a meaning: as a bias, it has no weight decay.
    not_decayed = ("aug_balance",)

    def __init__(self, config: MetaLAConfig):
        super().__init__()
        dim = config.decoder_embed_dim
        self.num_heads = config.decoder_attention_heads
        self.tau = float(config.tau)
        self.scale = config.head_key_dim**-0.5
        self.norm_eps = float(config.output_norm_eps)
        self.conv_width = config.conv_width

        columns = config.decoder_attention_heads * config.head_key_dim
        self.q_proj = nn.Linear(dim, columns, bias=False)
        self.k_gate = nn.Linear(dim, columns, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=True)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.aug_balance = nn.Parameter(torch.zeros(columns)) if config.self_augmentation else None
        self.conv1d = MetaLAShortConvolution(dim, config.conv_width)
        # Read by `_init_weights`, which sees each projection alone.
        self.q_proj._init_gain = self.k_gate._init_gain = QUERY_GATE_GAIN

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
        """Mixes tokens; a pure function of inputs and states, unless told to overwrite the latter.

        Args:
            x: [B, T, D].
            conv_state: [B, D, W - 1], the mixer's inputs before x, or `None`.
            recurrent_state: [B, H, K, V] float32, or `None`.
            padding: bool [B, T], true behind each row's tokens, or `None` where there is no
                padding.
            lengths: int64 [B], the tokens of each row; given with `padding`, and without
                `cu_seqlens`.
            cu_seqlens: int32 [N + 1] for N sequences packed along time (B = 1), or `None`.
            output_state: whether to return the states after the last token.
            overwrite_state: whether to write those over the states given, for decoding without
                new memory; with `output_state`, while no gradients are recorded.

        Returns:
            [B, T, D], and the two new states or `None`.
        """
        inputs, padded = x, lengths is not None
        x, new_conv_state = self.conv1d(
            x,
            conv_state,
            output_state and not padded,
            cu_seqlens,
            overwrite_state and not padded,
        )
        if output_state and padded:
            new_conv_state = convolution_state_at(inputs, conv_state, lengths, self.conv_width)
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
        """[B, T, H * width] to [B, T, H, width]."""
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

    The token mixer is MetaLA, or in a hybrid's attention layers softmax attention.
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
        """A pure function of its inputs and states, unless told to overwrite the latter.

        Args:
            x: [B, T, D].
            mixer_arguments: what the token mixer takes beside it: two states first.

        Returns:
            [B, T, D], and the two new states or `None`.
        """
        mixed, *states = self.token_mixer(self.token_norm(x), *mixer_arguments)
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), *states


class MetaLAPreTrainedModel(PreTrainedModel):
    """What the MetaLA models share: configuration, initialisation, what transformers may do."""

    config_class = MetaLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The state cannot return to an earlier token: transformers refuses assisted decoding by this.
    _is_stateful = True
    _supports_cache_class = True  # transformers 4.4x: a Cache, not tuples of keys and values
    _supports_sdpa = True  # what attention layers of a hybrid run
    _no_split_modules = ["MetaLADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: MetaLAConfig, *args: Any, **kwargs: Any):
        # Once more: from_pretrained(..., key=value) sets values after the configuration's check.
        config.check_values()
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation: normal(init_std) for embeddings and linears, xavier-uniform
        with gain 2 ** -2.5 for queries and gates, PyTorch's default for the convolution, zero for
        biases and `aug_balance`."""
        if isinstance(module, nn.Linear):
            if (gain := getattr(module, "_init_gain", None)) is not None:
                init.xavier_uniform_(module.weight, gain=gain)
            else:
                init.normal_(module.weight, mean=0.0, std=self.config.init_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.init_std)
        elif isinstance(module, MetaLAShortConvolution):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, MetaLARMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MetaLATokenMixer) and module.aug_balance is not None:
            init.zeros_(module.aug_balance)


class MetaLAModel(MetaLAPreTrainedModel):
    """Embedding, blocks and last norm."""

    def __init__(self, config: MetaLAConfig):
        super().__init__(config)
        # No padding_idx: padding reaches no token's result, so its row needs no protection, and
        # where padding and end of text are one token (the authors' default) the latter must stay
        # trainable.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)
        self.layers = nn.ModuleList(
            MetaLADecoderLayer(config, index) for index in range(config.decoder_layers)
        )
        self.final_norm = make_norm(config)
        self.has_attention = any(layer.is_attention for layer in self.layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] to what the first block reads, [B, T, D]."""
        hidden = self.embed_tokens(input_ids)
        return hidden if self.embed_scale == 1.0 else hidden * self.embed_scale

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MetaLACache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPast:
        """Runs the blocks.

        Args:
            input_ids: int64 [B, T]; or `inputs_embeds`, one of the two.
            attention_mask: [B, T], or with a cache [B, tokens before + T], whose last T columns
                count; 0 marks padding, which may stand anywhere. Values above 1 number the
                documents that are packed in a row.
            position_ids: [B, T] or [1, T], read only to tell packed documents apart: one begins
                where the position does not increase from token to token. Positions with gaps
                are one document, and attention layers count their positions themselves.
            past_key_values: the cache to continue from; it is updated in place.
            inputs_embeds: [B, T, D], taken as they are (not scaled).
            use_cache: whether to return a cache. By default the configuration says, not so in
                training and in `DataParallel` unless a cache is given.
            output_hidden_states: whether to return the inputs of all blocks and the last norm's
                output.
            return_dict: false for a tuple.
            cu_seqlens: int [N + 1], boundaries of N documents packed along time, B = 1.
                transformers' names `cu_seq_lens_q` and `cu_seq_lens_k` are read too.
            seq_idx: int [B, T] or [1, T], each token's document, as of Mamba models.
            kwargs: arguments that callers pass to every model, see `check_arguments`.

        Raises:
            ValueError: arguments that do not go together or have the wrong shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: wanted exactly one of the two")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        check_arguments(kwargs)
        batch, time = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if not time:
            name = "input_ids" if inputs_embeds is None else "inputs_embeds"
            raise ValueError(
                f"{name}: found no tokens, wanted at least one (`generate` passes on those that a "
                "cache has not read: its prompt begins with those that it has)"
            )
        self._check_cache(past_key_values, batch)
        continued = past_key_values is not None and past_key_values.has_previous_state()
        past = past_key_values.get_seq_length() if continued else 0
        before = past_key_values.key_padding if continued else None
        padding, numbers = read_mask(attention_mask, batch, time, past, before)
        position_ids, seq_idx = (
            self._for_each_token(name, values, batch, time)
            for name, values in (("position_ids", position_ids), ("seq_idx", seq_idx))
        )

        # Tokens to the front of their rows; `restore` is the way back. `results` is the same but
        # behind a row's last token, where it repeats this; `empty` rows have none in this call.
        lengths = order = restore = results = empty = None
        if padding is not None:
            lengths = time - padding.sum(1)
            empty = (lengths == 0)[:, None, None]
            if time > 1:
                order = tokens_first(padding)
                restore = order.argsort(dim=1)
                last = (lengths[:, None] - 1).clamp(min=0)
                behind = torch.arange(time, device=order.device) > order.gather(1, last)
                results = torch.where(behind, last, restore)
                padding = padding.gather(1, order)

        cu_seqlens = self._documents(
            {"cu_seqlens": cu_seqlens, **kwargs},
            document_starts(position_ids, (numbers, seq_idx), padding, order),
            input_ids if inputs_embeds is None else inputs_embeds,
            padding is not None,
            continued,
        )
        packed = cu_seqlens is not None
        if packed and (use_cache or past_key_values is not None):
            raise ValueError(
                "use_cache, past_key_values: a cache keeps one state per row, wanted neither with "
                "packed sequences"
            )
        if use_cache is None:
            # `DataParallel`, by which the Trainer evaluates on several GPUs, cannot join caches.
            alone = not getattr(self, "_is_replica", False)
            use_cache = not packed and (
                past_key_values is not None
                or (self.config.use_cache and not self.training and alone)
            )
        if use_cache and past_key_values is None:
            past_key_values = MetaLACache(self.config)

        def as_computed(x: torch.Tensor) -> torch.Tensor:
            """From the rows and the order in which the tokens came to those that are computed."""
            if order is not None:
                x = x.gather(1, order.to(x.device)[..., None].expand_as(x))
            return x.reshape(1, batch * time, -1) if packed else x

        def as_given(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
            """The way back, by `restore` or `results`."""
            x = x.reshape(batch, time, -1) if packed else x
            if index is not None:  # blocks may lie on other devices than the mask
                x = x.gather(1, index.to(x.device)[..., None].expand_as(x))
            return x

        hidden = inputs_embeds
        if hidden is None:
            hidden = self.embed(input_ids)
        hidden = as_computed(hidden)
        if packed:
            padding = None if padding is None else padding.reshape(1, -1)
            lengths = None
        key_padding = None if packed else join_padding(before, padding, past)
        attention = None
        if self.has_attention:
            attention = attention_inputs(self.config, hidden, past, key_padding, cu_seqlens)

        recorded = continued and past_key_values.decoding_graph is not None
        if recorded and not torch.compiler.is_compiling():
            take_back(past_key_values)
        all_hidden = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                # The block reads what is returned, so that `retain_grad` finds its gradient.
                all_hidden.append(as_given(hidden, restore))
                hidden = as_computed(all_hidden[-1])
            # Where a first call was interrupted, some layers hold states, but not the last.
            states = past_key_values.states(index) if continued else (None, None)
            # By position: reentrant checkpointing gives gradients to no others.
            if layer.is_attention:
                outputs = layer(hidden, *states, attention, use_cache)
            else:
                overwrite = use_cache and may_overwrite(*states)
                states = map(apart, states)
                outputs = layer(hidden, *states, padding, lengths, cu_seqlens, use_cache, overwrite)
            hidden = outputs[0]
            if use_cache and layer.is_attention:
                past_key_values.update_keys_values(outputs[1], outputs[2], index)
            elif use_cache:
                past_key_values.update_conv_state(apart(outputs[1]), index)
                past_key_values.update_recurrent_state(apart(outputs[2]), index)
        hidden = as_given(self.final_norm(hidden), results)
        if empty is not None and continued and past_key_values.last_hidden is not None:
            last = past_key_values.last_hidden.to(hidden)
            hidden = torch.where(empty.to(hidden.device), last, hidden)
        if use_cache:
            past_key_values.advance(time, key_padding, hidden[:, -1:].detach().clone())
        hidden_states = (*all_hidden, hidden) if output_hidden_states else None
        cache = past_key_values if use_cache else None
        if not return_dict:
            return tuple(value for value in (hidden, cache, hidden_states) if value is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache, hidden_states=hidden_states
        )

    def _check_cache(self, cache: MetaLACache | None, batch: int) -> None:
        """Raises a ValueError for a cache of another kind, another model or another batch size."""
        if cache is None:
            return
        if not isinstance(cache, MetaLACache):
            raise ValueError(
                f"past_key_values: found a {type(cache).__name__}, wanted a MetaLACache: pass "
                "MetaLACache(config), or leave it out"
            )
        if len(cache) and (wrong := cache.misfit(self.config)):
            raise ValueError(f"past_key_values: {wrong}")
        if cache.has_previous_state() and cache.batch_size != batch:
            raise ValueError(
                f"past_key_values: found the states of {cache.batch_size} sequences, wanted {batch}"
            )

    @staticmethod
    def _for_each_token(
        name: str, values: torch.Tensor | None, batch: int, time: int
    ) -> torch.Tensor | None:
        """values [B, T] or [1, T] as [B, T]; a ValueError names them where they are neither."""
        if values is None:
            return None
        if (shape := list(values.shape)) not in ([1, time], [batch, time]):
            raise ValueError(f"{name}: found {shape}, wanted [{batch}, {time}]")
        return values.expand(batch, -1)

    def _documents(
        self,
        arguments: dict[str, Any],
        starts: torch.Tensor | None,
        inputs: torch.Tensor,
        padded: bool,
        continued: bool,
    ) -> torch.Tensor | None:
        """cu_seqlens of the B rows laid end to end, or `None` where each row is one document.

        Args:
            arguments: those among which the boundaries are, if any are given.
            starts: see `document_starts`.
            inputs: [B, T] or [B, T, D].
        """
        batch, time = inputs.shape[:2]
        name = next((name for name in BOUNDARY_ARGUMENTS if arguments.get(name) is not None), None)
        if name is None:
            if starts is None or time == 1:
                return None
            if not continued:
                return boundaries(starts)
            demand(
                ~starts.any(),
                "position_ids, seq_idx: found a document that begins within a call that continues "
                "from a cache, wanted the tokens of one document a row",
            )
            return None
        if batch != 1 or padded or continued:
            raise ValueError(
                f"{name}: found with batch {batch}, padding {padded} and a continued cache "
                f"{continued}, wanted one row with neither"
            )
        cu_seqlens = read_boundaries(arguments, time, inputs.device, look=self.has_attention)
        if starts is not None and not torch.compiler.is_compiling():
            begins = starts.new_zeros(time + 1).index_fill(0, cu_seqlens.long(), True)
            if (starts[0] & ~begins[1:time]).any():
                raise ValueError(
                    f"position_ids, seq_idx, attention_mask: found a document that begins where "
                    f"{name} has no boundary, wanted all of them to say the same"
                )
        return cu_seqlens


class MetaLAForCausalLM(MetaLAPreTrainedModel, GenerationMixin):
    """A MetaLA model with a language-modelling head."""

    # Read as {tied: source} by transformers 5 and as a list of names before.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # beside the configuration's plan

    def __init__(self, config: MetaLAConfig):
        super().__init__(config)
        self.model = MetaLAModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model = decoder

    # The last parameter's name is what transformers 4.46's Trainer looks for before it passes the
    # number of items in an accumulated batch.
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MetaLACache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_logits_to_keep: int = 0,
        **loss_kwargs: Any,
    ) -> tuple | CausalLMOutputWithPast:
        """Runs the model and the head; see `MetaLAModel.forward` for the arguments it shares.

        Args:
            labels: int64 [B, T]; position t is scored against label t + 1, -100 is not scored.
            logits_to_keep: the last so many positions get logits (0: all); or positions for all
                rows [P] or for each [B, P]; or a bool mask [B, T], which gives [true, vocab].
            num_logits_to_keep: the same under its name up to transformers 4.4x.
            loss_kwargs: what the loss function names as its arguments, of transformers':
                `num_items_in_batch` divides the summed loss in place of the number of labels;
                `shift_labels` [B, T], labels that are shifted already, take the place of `labels`
                (not in its first versions). Others as in `MetaLAModel.forward`.

        Returns:
            With `loss` (where labels are given), `logits` [B, T, vocab], `past_key_values`,
            `hidden_states`.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        others = loss_kwargs
        if loss_kwargs:
            read = inspect.signature(self.loss_function).parameters
            others = {name: x for name, x in loss_kwargs.items() if name not in read}
            check_arguments(others)
        plain = attention_mask is inputs_embeds is labels is cu_seqlens is None and not (
            output_hidden_states
            or self.config.output_hidden_states
            or use_cache is False
            or isinstance(logits_to_keep, torch.Tensor)
        )
        if plain and self._may_replay(past_key_values, input_ids):
            logits = replay_step(self, input_ids, past_key_values)
            if logits is not None:
                if not return_dict:
                    return logits, past_key_values
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            **others,
        )
        hidden = self._positions_to_keep(
            outputs.last_hidden_state,
            logits_to_keep
            if isinstance(logits_to_keep, torch.Tensor)
            else logits_to_keep or num_logits_to_keep,
        )
        logits = self.lm_head(hidden)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs
            )
        if not return_dict:
            values = (loss, logits, outputs.past_key_values, outputs.hidden_states)
            return tuple(value for value in values if value is not None)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _may_replay(self, cache: MetaLACache | None, input_ids: torch.Tensor | None) -> bool:
        """Whether a call with nothing but these is a decoding step as `replay_step` takes it. A
        mask would have to be looked at, which waits for the GPU: `generate` gives none after the
        prompt."""
        return (
            isinstance(cache, MetaLACache)
            and cache.decoding_graph is not None
            and input_ids is not None
            and list(input_ids.shape) == [cache.batch_size, 1]
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    @staticmethod
    def _positions_to_keep(hidden: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
        """hidden [B, T, D] at the positions that `logits_to_keep` asks for."""
        if isinstance(keep, int):
            return hidden[:, -keep:] if keep else hidden
        keep = keep.to(hidden.device)
        if keep.ndim == 1:
            return hidden[:, keep]
        if keep.dtype == torch.bool:
            return hidden[keep]
        return torch.take_along_dim(hidden, keep[..., None], dim=1)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: MetaLACache | None = None,
        attention_mask: torch.Tensor | None = None,
        # By name, as `generate` looks here for whether prompts may be embeddings.
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        # The model counts its positions itself, and generation packs no sequences.
        inputs.pop("position_ids", None)
        inputs.pop("cache_position", None)
        return inputs

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """No positions that the model does not count itself, so none to carry from step to step."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """States of its own kind, so none of transformers' caches."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` an empty MetaLACache where the caller gave none, for chunked prefill.

        Raises:
            ValueError: this model was to draft for another one: rejected tokens could not be taken
                back; or a row holds several documents, of which one alone can be continued.
        """
        if getattr(generation_config, "is_assistant", False):
            raise ValueError(
                f"{type(self).__name__} cannot be an assistant model: its state cannot go back to "
                "the last accepted token"
            )
        self._check_one_document(model_kwargs)
        # A static cache is what transformers compiles decoding for: ours is static as it is.
        if (
            generation_config.cache_implementation == "static"
            and generation_config.use_cache is not False
            and model_kwargs.get("past_key_values") is None
        ):
            eager = getattr(generation_config, "disable_compile", False)
            model_kwargs["past_key_values"] = MetaLACache(
                self.config, decoding_graph="eager" if eager else "compiled"
            )
            return
        # Checks a cache of the caller's, and says that another cache_implementation has no effect.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MetaLACache(self.config)

    @staticmethod
    def _check_one_document(model_kwargs: dict) -> None:
        """Raises a ValueError for arguments of `generate` by which a row is several documents."""
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        found = [name for name in BOUNDARY_ARGUMENTS if model_kwargs.get(name) is not None]
        if model_kwargs.get("seq_idx") is not None:
            found.append("seq_idx")
        tensor = isinstance(mask, torch.Tensor)  # `forward` refuses other masks
        if tensor and (mask > 1).any():
            found.append("attention_mask")
        if positions is not None:
            if positions.ndim != 2:
                raise ValueError(f"position_ids: found {list(positions.shape)}, wanted [B, T]")
            padding = order = None
            if tensor and mask.shape == positions.shape:
                padding = mask == 0
                order = tokens_first(padding)
                padding = padding.gather(1, order)
            if document_starts(positions, (), padding, order).any():
                found.append("position_ids")
        if found:
            raise ValueError(
                f"{found[0]}: found several documents in a row, wanted one: `generate` continues "
                "one a row"
            )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> dict:
        """Without the mask, once a cache has seen it: what follows is no padding, but in rows that
        have ended, whose results nobody reads. To lengthen and read a mask at every token would
        take time that grows with the text."""
        if outputs.get("past_key_values") is not None:
            model_kwargs.pop("attention_mask", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """transformers 5's `generate_batch`, which pages keys and values, starts here."""
        raise ValueError(
            "continuous batching is not supported with stateful models, such as "
            f"{type(self).__name__}"
        )

    def _prepare_generation_config(
        self, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        """transformers' first step of `generate`, the same in all its versions. What they do with
        these two differs: some ignore them, some end in an AttributeError, some ask the Hub."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if config.get_generation_mode() == GenerationMode.CONTRASTIVE_SEARCH:
            raise ValueError(
                "contrastive search is not supported with stateful models, such as "
                f"{type(self).__name__}"
            )
        if getattr(config, "return_legacy_cache", None):  # transformers 4
            raise ValueError(
                "return_legacy_cache: found True, wanted False: the cache is a MetaLACache, whose "
                "states are no tuples of keys and values"
            )
        return config, model_kwargs


# The Trainer gives weight decay by the names that this function finds, which leaves out biases, and
# norms by their class (transformers 4) or name (5); a model has no say.
_parameter_names = trainer_pt_utils.get_parameter_names


@functools.wraps(_parameter_names)
def _decayed_parameter_names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """transformers' function, without what one of our modules says of itself. It calls itself, by
    its name in its module, for each module of a model."""
    left_out = model.not_decayed if isinstance(model, OWN_WEIGHTS) else ()
    return [name for name in _parameter_names(model, *args, **kwargs) if name not in left_out]


OWN_WEIGHTS = (MetaLARMSNorm, MetaLATokenMixer)
trainer_pt_utils.get_parameter_names = _decayed_parameter_names

# What steps in one launch do in place of the modules, or not again.
know_class(MetaLARMSNorm, "dim", "eps")
know_class(MetaLALayerNorm, "eps", "normalized_shape")
know_class(MetaLAShortConvolution)
know_class(MetaLATokenMixer, "num_heads", "tau", "scale", "norm_eps")
know_class(MetaLAChannelMixer)
know_class(MetaLADecoderLayer)
know_class(MetaLAModel, "embed_scale")
know_code(globals(), "meta_linear_attention", "short_convolution", "swiglu")

# The Trainer shifts labels for its label smoothing where it finds the model's name here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MetaLAConfig.model_type] = MetaLAForCausalLM.__name__

if __name__.startswith("transformers_modules."):
    # Loaded from a model folder: saved with this code. transformers 5 would say so by itself.
    MetaLAModel.register_for_auto_class("AutoModel")
    MetaLAForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MetaLAForCausalLM", "MetaLAModel", "MetaLAPreTrainedModel"]
