"""Small masks for models without attention layers.

GPT-NeoX makes an attention mask, s x s, for every batch (1 GiB at 32k tokens). Where all layers are
MetaLA, nobody reads it, and the batch gets a mask of one element. With `metala: {reset_at_document:
true}` it gets the boundaries of documents instead (`documents.py`). The settings of the model that
a batch is for decide.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatron_patch.architecture import METALA
from megatron_patch.neox import documents
from megatron_patch.neox.patching import in_metala_runs, replaces, swapped
from megatron_patch.neox.token_groups import own_tokens


def shrink_unread_attention_mask() -> None:
    """Replaces the functions of GPT-NeoX that make a mask: for training and for a pipeline, for the
    evaluation harness, and for generation."""
    from megatron import mpu, text_generation_utils, training, utils

    def is_read(neox_args: Any) -> bool:
        return set(neox_args.attention_config) != {METALA}

    def unread_mask(device: torch.device, **_: Any) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)

    def small_if_unread(neox_args: Any) -> AbstractContextManager:
        if is_read(neox_args):
            return nullcontext()
        return swapped(utils, "get_attn_mask", unread_mask)

    @in_metala_runs(training._get_batch)
    def make_batch_with_mask_if_read(make_batch, neox_args, tokenizer, keys, data, *args, **kwargs):
        with small_if_unread(neox_args):
            batch = make_batch(neox_args, tokenizer, keys, data, *args, **kwargs)
        if not documents.resets(neox_args):
            return batch
        # Without tensor parallelism the tokens are on the host, which then need not wait for the
        # device to learn how many documents there are. A pipeline hands copies of the mask on.
        is_alone = mpu.get_model_parallel_world_size() == 1 and not neox_args.is_pipe_parallel
        return with_documents(neox_args, batch, data[keys[0]][:, :-1] if is_alone else None)

    def with_documents(neox_args: Any, batch: tuple, on_host: torch.Tensor | None) -> tuple:
        tokens, labels, loss_mask, mask, positions = batch
        eod = neox_args.tokenizer.eod
        starts = own_tokens(documents.find_starts(tokens, eod))
        if is_read(neox_args):
            mask, positions = documents.attention_mask(starts, mask), documents.positions(starts)
        else:
            mask = starts[:, None, None]
        if on_host is not None:
            found = documents.pack(own_tokens(documents.find_starts(on_host, eod)))
            documents.remember(mask, len(tokens), found.to(tokens.device, non_blocking=True))
        return tokens, labels, loss_mask, mask, positions

    @replaces(training.get_batch_sequential)
    def make_inputs_with_mask_if_read(make_inputs, forward_input, neox_args):
        tokens, positions = forward_input[:2]
        # GPT-NeoX makes the mask of a batch a second time here, which would lose the documents.
        if documents.resets(neox_args) and forward_input[2].shape[-1] == tokens.shape[1]:
            return forward_input
        if is_read(neox_args):
            return make_inputs(forward_input, neox_args)
        return tokens, positions, unread_mask(tokens.device)

    @in_metala_runs(text_generation_utils.get_batch)
    def make_prompt_with_mask_if_read(make_prompt, neox_args, context_tokens):
        with small_if_unread(neox_args):
            return make_prompt(neox_args, context_tokens)
