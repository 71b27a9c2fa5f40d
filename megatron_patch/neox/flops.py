"""Floating-point operations of a model with MetaLA layers, for the FLOPS that GPT-NeoX prints."""

from __future__ import annotations

import torch

from megatron_patch.architecture import METALA, SOFTMAX_TYPES
from megatron_patch.architecture_neox import from_neox


def forward_flops_per_token(args) -> float:
    """Returns the operations of one token's forward pass through the model; a multiply-add is two.

    A MetaLA layer of hidden size d, MLP width f, kernel size W, and H heads with a state K x V,
    where K = expand_k d / H and V = d / H:

        projections    2 d (2 H K + 2 d) + 2 d^2
        recurrence     5 H K V                       decay (1), rank-one update (2), output (2)
        convolution    2 W d
        MLP            6 d f

    An attention layer of type global or flash, with G key heads, an MLP of width f' and sequences
    of s tokens. As in GPT-NeoX's own formulas, each token reads all s:

        projections    2 d (d + 2 d G / H) + 2 d^2
        attention      4 s d                         scores and weighted sum
        MLP            6 d f'

    A layer of another type counts by GPT-NeoX's formula for a GPT, 24 d^2 + 4 s d. The output layer
    adds 2 d times the padded vocabulary; the embedding adds nothing.
    """
    model = from_neox(args)
    d, heads = model.hidden_size, model.num_heads
    keys = heads * model.key_width
    metala = (
        2 * d * (2 * keys + 2 * d)
        + 2 * d**2
        + 5 * keys * model.value_width
        + 2 * model.metala.conv_width * d
        + 6 * d * model.intermediate_size
    )
    pairs = 4 * args.seq_length * d
    total = 2 * d * args.padded_vocab_size
    for kind in model.layer_types or (METALA,) * model.num_layers:
        if kind == METALA:
            total += metala
        elif kind in SOFTMAX_TYPES:
            of = model.attention
            total += 4 * d**2 * (1 + of.num_kv_heads / heads) + pairs + 6 * d * of.intermediate_size
        else:
            total += 24 * d**2 + pairs
    return total


def flops_per_second(args, iteration_seconds: float, passes: int) -> float:
    """Returns the operations per second and rank of an iteration that costs `passes` forward
    passes: 3 for forward and backward, 4 where the forward pass is recomputed."""
    tokens = args.train_batch_size * args.seq_length
    flops = passes * tokens * forward_flops_per_token(args)
    return flops / (iteration_seconds * torch.distributed.get_world_size())
