"""What a batch has in the place of GPT-NeoX's attention mask, s x s for every batch (1 GiB at 32k
tokens), which only attention layers read.

The mask is made from the settings of the model that a batch is for. Where all layers are MetaLA,
the batch gets a mask of one element. With `metala: {reset_at_document: true}` it gets the
boundaries of documents instead (`documents.py`).
"""

from __future__ import annotations

import copy
import functools

import torch

from megatron_patch.architecture import METALA
from megatron_patch.neox import documents
from megatron_patch.neox.patching import has_metala_layers, replace
from megatron_patch.neox.token_groups import own_tokens

# The `sliding_window_width` that stands for "no layer reads the mask". No settings can have it.
_UNREAD = -1


def shrink_unread_attention_mask() -> None:
    """Replaces the four functions of GPT-NeoX that make a mask: for training, for a pipeline, for
    the evaluation harness and for generation."""
    from megatron import mpu, text_generation_utils, training
    from megatron.utils import get_attn_mask

    make_batch, make_prompt = training._get_batch, text_generation_utils.get_batch
    make_inputs = training.get_batch_sequential

    def is_read(neox_args) -> bool:
        return set(neox_args.attention_config) != {METALA}

    def unread_mask(device: torch.device) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)

    @functools.wraps(get_attn_mask)
    def get_mask_if_read(seq_length, device, sliding_window_width):
        if sliding_window_width == _UNREAD:
            return unread_mask(device)
        return get_attn_mask(seq_length, device, sliding_window_width)

    def resets(neox_args) -> bool:
        return has_metala_layers(neox_args) and documents.resets(neox_args)

    @functools.wraps(make_batch)
    def make_batch_with_mask_if_read(neox_args, tokenizer, keys, data, *args, **kwargs):
        mask_args = neox_args
        if not is_read(neox_args):
            mask_args = copy.copy(neox_args)
            mask_args.sliding_window_width = _UNREAD
        batch = make_batch(mask_args, tokenizer, keys, data, *args, **kwargs)
        if not resets(neox_args):
            return batch
        # Without tensor parallelism the tokens are on the host, which then need not wait for the
        # device to learn how many documents there are. A pipeline hands copies of the mask on.
        is_alone = mpu.get_model_parallel_world_size() == 1 and not neox_args.is_pipe_parallel
        return with_documents(neox_args, batch, data[keys[0]][:, :-1] if is_alone else None)

    def with_documents(neox_args, batch, on_host):
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

    @functools.wraps(make_inputs)
    def make_inputs_with_mask_if_read(forward_input, neox_args):
        tokens, positions = forward_input[:2]
        # GPT-NeoX makes the mask of a batch a second time here, which would lose the documents.
        if resets(neox_args) and forward_input[2].shape[-1] == tokens.shape[1]:
            return forward_input
        if is_read(neox_args):
            return make_inputs(forward_input, neox_args)
        return tokens, positions, unread_mask(tokens.device)

    @functools.wraps(make_prompt)
    def make_prompt_with_mask_if_read(neox_args, context_tokens):
        if is_read(neox_args):
            return make_prompt(neox_args, context_tokens)
        tokens = context_tokens.contiguous().cuda()
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens, unread_mask(tokens.device), positions.expand_as(tokens)

    replace(get_attn_mask, get_mask_if_read)
    replace(make_batch, make_batch_with_mask_if_read)
    replace(make_inputs, make_inputs_with_mask_if_read)
    replace(make_prompt, make_prompt_with_mask_if_read)
