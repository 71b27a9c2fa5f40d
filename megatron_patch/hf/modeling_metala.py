"""MetaLA language models (Meta Linear Attention, arXiv 2411.10741) for Hugging Face transformers.

- Padding may stand anywhere. The model moves each row's tokens to the start of the row, so that the
  convolution never meets a gap, and moves the results back. Behind the tokens it opens the gate
  (decay 1, key 0), which leaves the recurrent state as it is. A row's results and state are those
  of the row without padding, at any batch size, with or without a cache. Padding gets the
  result of the token that precedes it, so that generation can read the last column.
- `cu_seqlens`, `seq_idx`, `position_ids` that restart, or numbers in the mask separate packed
  documents (see `documents_metala`). Nothing crosses from one to the next.
- `MetaLACache` holds the states, and the keys and values of a hybrid's attention layers. A call
  with a cache continues it by one token or many.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# transformers 4 copies only those files of a model folder that this file imports by name, so it
# imports them all.
from . import layers_metala
from .architecture_metala import Architecture  # noqa: F401
from .attention_metala import attention_inputs, join_padding
from .cache_metala import MetaLACache
from .classification_metala import MetaLAClassificationMixin
from .configuration_metala import MetaLAConfig
from .decoding_metala import detach_from_graph, register_class, register_functions, replay_step
from .documents_metala import (
    ComputedOrder,
    check_arguments,
    document_starts,
    find_cu_seqlens,
    for_each_token,
    read_mask,
    without_unpredicted,
)
from .generation_metala import MetaLAGenerationMixin
from .layers_metala import (
    MetaLAChannelMixer,
    MetaLADecoderLayer,
    MetaLALayerNorm,
    MetaLARMSNorm,
    MetaLAShortConvolution,
    MetaLATokenMixer,
    make_norm,
)
from .ops_metala import meta_linear_attention, short_convolution  # noqa: F401
from .pretrained_metala import MetaLAPreTrainedModel


def may_overwrite(*states: torch.Tensor | None) -> bool:
    """Returns whether new states may be written over these.

    Not if a gradient may need the old ones, nor if they are inference tensors outside of
    `inference_mode`.
    """
    return not torch.is_grad_enabled() and all(
        state is not None
        and not state.requires_grad
        and (torch.is_inference_mode_enabled() or not state.is_inference())
        for state in states
    )


def clone_for_autograd(state: torch.Tensor | None) -> torch.Tensor | None:
    """Copies a state that autograd may save, since the cache may overwrite its own later.

    Returns the state itself where this cannot happen.
    """
    if state is None or state.requires_grad or not torch.is_grad_enabled():
        return state
    return state.clone()


class MetaLAModel(MetaLAPreTrainedModel):
    """MetaLA model without a head: embedding, blocks and last norm."""

    def __init__(self, config: MetaLAConfig):
        super().__init__(config)
        # No padding_idx. Padding reaches no token's result, so its row needs no protection; and
        # where padding and end of text are one token, as by default, that row must be trained.
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
        """Maps token ids [B, T] to the input of the first block, [B, T, D]."""
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
        """Runs the model.

        Args:
            input_ids: int64 [B, T]. Either these or `inputs_embeds` must be given.
            attention_mask: [B, T], or with a cache [B, tokens before + T], of which the last T
                columns count. 0 marks padding, which may stand anywhere. Values above 1 number the
                documents packed in a row.
            position_ids: [B, T] or [1, T], read only to separate packed documents: one begins where
                the position does not increase. Positions with gaps are one document. Attention
                layers count their positions themselves.
            past_key_values: the cache to continue from, updated in place.
            inputs_embeds: [B, T, D], used without scaling.
            use_cache: whether to return a cache. The default is the configuration's, except in
                training and in `DataParallel`, where it is false unless a cache is given.
            output_hidden_states: whether to return the inputs of all blocks and the output of the
                last norm.
            return_dict: false for a tuple.
            cu_seqlens: int [N + 1], boundaries of N documents packed along time, with B = 1.
                transformers' names `cu_seq_lens_q` and `cu_seq_lens_k` are read too.
            seq_idx: int [B, T] or [1, T], the document of each token, as in Mamba models.
            kwargs: arguments that callers pass to every model, see `check_arguments`.

        Returns:
            `last_hidden_state` [B, T, D], `past_key_values` and `hidden_states`.

        Raises:
            ValueError: arguments contradict each other or have the wrong shape.
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
        past_padding = past_key_values.key_padding if continued else None
        padding, document_ids = read_mask(attention_mask, batch, time, past, past_padding)
        position_ids = for_each_token("position_ids", position_ids, batch, time)
        seq_idx = for_each_token("seq_idx", seq_idx, batch, time)

        order = ComputedOrder(padding, (batch, time))
        cu_seqlens = find_cu_seqlens(
            {"cu_seqlens": cu_seqlens, **kwargs},
            document_starts(position_ids, (document_ids, seq_idx), order.padding, order.index),
            input_ids if inputs_embeds is None else inputs_embeds,
            padding is not None,
            continued,
            check_values=self.has_attention,
        )
        packed = cu_seqlens is not None
        if packed:
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "use_cache, past_key_values: a cache keeps one state per row, wanted neither "
                    "with packed sequences"
                )
            order.pack()
        if use_cache is None:
            # The Trainer evaluates on several GPUs by `DataParallel`, which cannot join caches.
            is_replica = getattr(self, "_is_replica", False)
            use_cache = not packed and (
                past_key_values is not None
                or (self.config.use_cache and not self.training and not is_replica)
            )
        if use_cache and past_key_values is None:
            past_key_values = MetaLACache(self.config)

        hidden = order.apply(self.embed(input_ids) if inputs_embeds is None else inputs_embeds)
        key_padding = None if packed else join_padding(past_padding, order.padding, past)
        attention = None
        if self.has_attention:
            attention = attention_inputs(self.config, hidden, past, key_padding, cu_seqlens)

        if continued and past_key_values.decoding_graph and not torch.compiler.is_compiling():
            detach_from_graph(past_key_values)
        all_hidden = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                # The block reads what is returned, so that `retain_grad` finds its gradient.
                all_hidden.append(order.undo(hidden))
                hidden = order.apply(all_hidden[-1])
            # After a first call that was interrupted, some layers hold states, but not the last.
            states = past_key_values.states(index) if continued else (None, None)
            # By position, since reentrant checkpointing passes no gradients to keyword arguments.
            if layer.is_attention:
                outputs = layer(hidden, *states, attention, use_cache)
            else:
                overwrite = use_cache and may_overwrite(*states)
                places = order.padding, order.lengths, cu_seqlens
                states = map(clone_for_autograd, states)
                outputs = layer(hidden, *states, *places, use_cache, overwrite)
            hidden = outputs[0]
            if use_cache and layer.is_attention:
                past_key_values.update_keys_values(outputs[1], outputs[2], index)
            elif use_cache:
                past_key_values.update_conv_state(clone_for_autograd(outputs[1]), index)
                past_key_values.update_recurrent_state(clone_for_autograd(outputs[2]), index)
        before = past_key_values.last_hidden if continued else None
        hidden = order.results(self.final_norm(hidden), before)
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


class MetaLAForCausalLM(MetaLAPreTrainedModel, MetaLAGenerationMixin):
    """MetaLA model with a language-modelling head."""

    # transformers 5 reads {tied: source}, transformers 4 the names alone.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # in addition to the configuration's plan

    def __init__(self, config: MetaLAConfig):
        super().__init__(config)
        self.model = MetaLAModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model = decoder

    # transformers 4.46's Trainer looks for the name `loss_kwargs` before it passes
    # `num_items_in_batch`.
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
        """Runs the model and the head. Arguments not listed here are those of `MetaLAModel`.

        Args:
            labels: int64 [B, T]. Position t is scored against label t + 1; -100 is not scored, nor
                a row's first token behind padding: nothing predicts it.
            logits_to_keep: number of last positions that get logits (0 for all); or positions, [P]
                for all rows or [B, P] for each; or a bool mask [B, T], which gives [true, vocab].
            num_logits_to_keep: the same under its name up to transformers 4.4x.
            loss_kwargs: arguments of transformers' loss function: `num_items_in_batch` divides the
                summed loss in place of the number of labels; `shift_labels` [B, T], already
                shifted, replace `labels` (in newer versions). Others as in `MetaLAModel.forward`.

        Returns:
            `loss` if labels are given, `logits` [B, T, vocab], `past_key_values`, `hidden_states`.
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
        if not isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep or num_logits_to_keep
        logits = self.lm_head(self._positions_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels, loss_kwargs = without_unpredicted(labels, loss_kwargs, attention_mask)
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
        """Returns whether a call with no other arguments is a decoding step for `replay_step`.

        A mask would have to be read, which waits for the GPU. `generate` passes none after the
        prompt.
        """
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
        """Selects the positions of hidden [B, T, D] that `logits_to_keep` asks for."""
        if isinstance(keep, int):
            return hidden[:, -keep:] if keep else hidden
        keep = keep.to(hidden.device)
        if keep.ndim == 1:
            return hidden[:, keep]
        if keep.dtype == torch.bool:
            return hidden[keep]
        return torch.take_along_dim(hidden, keep[..., None], dim=1)


class MetaLAForSequenceClassification(MetaLAClassificationMixin, MetaLAPreTrainedModel):
    """MetaLA model with a head of `config.num_labels` numbers; a reward model has one."""

    def __init__(self, config: MetaLAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MetaLAModel(config)
        self.score = nn.Linear(config.decoder_embed_dim, config.num_labels, bias=False)
        self.post_init()


# The code that a captured decoding step replaces.
register_class(MetaLARMSNorm, "dim", "eps")
register_class(MetaLALayerNorm, "eps", "normalized_shape")
register_class(MetaLAShortConvolution)
register_class(MetaLATokenMixer, "num_heads", "tau", "scale", "norm_eps")
register_class(MetaLAChannelMixer)
register_class(MetaLADecoderLayer)
register_class(MetaLAModel, "embed_scale")
register_functions(vars(layers_metala), "meta_linear_attention", "short_convolution", "swiglu")

# The Trainer shifts labels for its label smoothing if it finds the model's name here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MetaLAConfig.model_type] = MetaLAForCausalLM.__name__

if __name__.startswith("transformers_modules."):
    # Loaded from a model folder, so save this code with the model. transformers 5 does so anyway.
    MetaLAModel.register_for_auto_class("AutoModel")
    MetaLAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    MetaLAForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "MetaLAForCausalLM",
    "MetaLAForSequenceClassification",
    "MetaLAModel",
    "MetaLAPreTrainedModel",
]
