"""The parts of `generate` that differ for MetaLA models.

A state replaces keys and values, so `generate` makes a `MetaLACache`, and refuses the methods that
would take a cache back to an earlier token.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from .cache_metala import MetaLACache
from .documents_metala import CU_SEQLENS_ARGUMENTS, ComputedOrder, document_starts


class MetaLAGenerationMixin(GenerationMixin):
    """transformers' `GenerationMixin` for models whose cache is a `MetaLACache`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: MetaLACache | None = None,
        attention_mask: torch.Tensor | None = None,
        # In the signature, where `generate` looks for whether prompts may be embeddings.
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict:
        # The number of tokens that the cache has not read; transformers keeps as many of the
        # prompt. With 0, transformers 5 keeps them all, and the model would read them again.
        unread = kwargs.get("next_sequence_length")
        if unread is None and (positions := kwargs.get("cache_position")) is not None:
            unread = len(positions)
        if unread is not None and unread < 1:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            raise ValueError(
                f"past_key_values: found a cache that has read {past_key_values.get_seq_length()} "
                f"tokens, wanted fewer than the {length} of the prompt, which begins with them"
            )
        # transformers 5 passes `generate(tokenizer=...)`, which `stop_strings` needs, on to here.
        kwargs.pop("tokenizer", None)
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
        """Returns no positions, since the model counts them itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tells transformers to make none of its own caches."""
        return False

    def _prepare_generation_config(
        self, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        """Refuses the settings that a state cannot follow.

        This is the first step of `generate` in every version of transformers. Without these checks
        some versions would ignore the settings, some end in an AttributeError, some ask the Hub.
        """
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

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` an empty `MetaLACache` unless the caller passed a cache. Raises a
        ValueError if this model is to be an assistant, whose rejected tokens it could not take
        back; or a row holds several documents, of which only one can be continued."""
        if getattr(generation_config, "is_assistant", False):
            raise ValueError(
                f"{type(self).__name__} cannot be an assistant model: its state cannot go back to "
                "the last accepted token"
            )
        self._check_one_document(model_kwargs)
        # transformers compiles decoding for a static cache. MetaLACache has a constant size anyway.
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
        # Checks the caller's cache, and warns that another `cache_implementation` has no effect.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MetaLACache(self.config)

    @staticmethod
    def _check_one_document(model_kwargs: dict) -> None:
        """Raises a ValueError if the arguments of `generate` put several documents in a row."""
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        found = [name for name in CU_SEQLENS_ARGUMENTS if model_kwargs.get(name) is not None]
        if model_kwargs.get("seq_idx") is not None:
            found.append("seq_idx")
        is_tensor = isinstance(mask, torch.Tensor)  # `forward` refuses other masks
        if is_tensor and (mask > 1).any():
            found.append("attention_mask")
        if positions is not None:
            if positions.ndim != 2:
                raise ValueError(f"position_ids: found {list(positions.shape)}, wanted [B, T]")
            fits = is_tensor and mask.shape == positions.shape
            order = ComputedOrder(mask == 0 if fits else None, positions.shape)
            if document_starts(positions, (), order.padding, order.index).any():
                found.append("position_ids")
        if found:
            raise ValueError(
                f"{found[0]}: found several documents in a row, wanted one: `generate` continues "
                "one a row"
            )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> dict:
        """Drops the mask once a cache has read the prompt.

        What follows is no padding, except in rows that have ended, whose results nobody reads. To
        lengthen and check a mask at every token would take time that grows with the text.
        """
        if outputs.get("past_key_values") is not None:
            model_kwargs.pop("attention_mask", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refuses `generate_batch` of transformers 5, which pages keys and values."""
        raise ValueError(
            "continuous batching is not supported with stateful models, such as "
            f"{type(self).__name__}"
        )
