"""Floating-point operations of a model with MetaLA layers, for GPT-NeoX's printed TFLOPS."""

from __future__ import annotations

import torch

from megatron_patch.neox.settings import MetaLASettings, metala_intermediate_size


def forward_flops_per_token(args) -> float:
    """Operations (a multiply-add is two) of one token's forward pass through the whole model.

    A MetaLA layer, with d hidden_size, f the MLP's width, W the convolution's, and H heads of state
    K x V = d/2H x d/H:

        projections    2 * 3d^2 + 2 * d^2
        recurrence     5 * H * K * V = 5 d^2 / 2H    decay, rank-one update (2), read-out (2)
        convolution    2 W d
        MLP            6 d f

    An attention layer counts as in GPT-NeoX's own formula, 24 d^2 + 4 s d. The output layer is 2 d
    times the padded vocabulary; the embedding look-up costs nothing.
    """
    d, heads = args.hidden_size, args.num_attention_heads
    metala = (
        8 * d**2
        + 2.5 * d**2 / heads
        + 2 * MetaLASettings.parse(args.metala).conv_width * d
        + 6 * d * metala_intermediate_size(args)
    )
    attention = 24 * d**2 + 4 * args.seq_length * d
    number = args.attention_config.count("metala")
    return number * metala + (args.num_layers - number) * attention + 2 * d * args.padded_vocab_size


def flops_per_second(args, iteration_seconds: float, passes: int) -> float:
    """Operations a second and rank, over an iteration of `passes` times the forward pass's work
    (3: forward and backward; 4: with the forward pass recomputed)."""
    tokens = args.train_batch_size * args.seq_length
    flops = passes * tokens * forward_flops_per_token(args)
    return flops / (iteration_seconds * torch.distributed.get_world_size())
