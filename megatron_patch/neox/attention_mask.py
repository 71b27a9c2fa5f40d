"""Leaves out the attention mask, s x s for every batch (1 GiB at 32k tokens), which only attention
layers read.

The mask is made from the settings of the model that a batch is for. Where all layers are MetaLA,
the batch gets a mask of one element.
"""

from __future__ import annotations

import copy
import functools

import torch

from megatron_patch.architecture import METALA
from megatron_patch.neox.patching import replace

# The `sliding_window_width` that stands for "no layer reads the mask". No settings can have it.
_UNREAD = -1


def shrink_unread_attention_mask() -> None:
    """Replaces the four functions of GPT-NeoX that make a mask: for training, for a pipeline, for
    the evaluation harness and for generation."""
    from megatron import text_generation_utils, training
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

    @functools.wraps(make_batch)
    def make_batch_with_mask_if_read(neox_args, *args, **kwargs):
        if not is_read(neox_args):
            neox_args = copy.copy(neox_args)
            neox_args.sliding_window_width = _UNREAD
        return make_batch(neox_args, *args, **kwargs)

    @functools.wraps(make_inputs)
    def make_inputs_with_mask_if_read(forward_input, neox_args):
        if is_read(neox_args):
            return make_inputs(forward_input, neox_args)
        return forward_input[0], forward_input[1], unread_mask(forward_input[0].device)

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
