"""Sequence parallelism (arXiv 2205.05198), GPT-NeoX's `sequence_parallel: true`: between the
projections of a layer, tensor-parallel ranks split the tokens, not the work of a token.

GPT-NeoX's column-parallel projections gather the tokens, its row-parallel ones add up and scatter
them. A MetaLA layer's norms and residual sums run on a rank's own tokens. Its mixer gathers them
before the convolution (`mixer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_patch.architecture import METALA, SOFTMAX_TYPES, refuse
from megatron_patch.architecture_neox import expand_attention_config
from megatron_patch.neox.patching import has_metala_layers, overrides, replaces
from megatron_patch.neox.recompute import Compute, recomputed
from megatron_patch.neox.token_groups import context_size, is_sequence_parallel


def column_parallel(
    linear: torch.nn.Module, x: torch.Tensor, keep_gathered: bool, again: Compute | None
) -> torch.Tensor:
    """Returns the product of GPT-NeoX's `ColumnParallelLinear`, which has no bias, and x [s, b, h].

    Args:
        x: with sequence parallelism [s / tp, b, h].
        keep_gathered: with sequence parallelism, whether to keep the gathered tokens for the
            backward pass, as GPT-NeoX does, which is all that not splitting them would cost.
            Otherwise they are gathered again, as in Megatron-LM.
        again: computes x again; without it x is kept.
    """
    if not linear.sequence_parallel or keep_gathered:
        with recomputed(x, again):
            return linear(x)[0]
    from megatron import mpu

    gather = mpu.gather_from_sequence_parallel_region
    whole = gather(x)
    own = None if again else x.detach()
    with recomputed(whole, lambda: gather(again() if again else own)):
        return F.linear(whole, linear.weight)


def row_parallel_sum(linear: torch.nn.Module, product: torch.Tensor) -> torch.Tensor:
    """Adds a rank's product [s, b, h] to those of the other tensor-parallel ranks, as GPT-NeoX's
    `RowParallelLinear` does; with sequence parallelism returns this rank's tokens of it."""
    from megatron import mpu

    if linear.sequence_parallel:
        return mpu.reduce_scatter_to_sequence_parallel_region(product)
    return mpu.reduce_from_model_parallel_region(product)


def check_sequence_parallel(args: Any, program: str) -> None:
    """Raises a SettingsError if a run of `program` cannot split its tokens over tensor-parallel
    ranks."""
    if not is_sequence_parallel(args):
        return

    def refuse_it(wanted: str) -> None:
        refuse("sequence_parallel", True, f"false {wanted}")

    if program != "train.py":
        refuse_it(f"in {program}: GPT-NeoX cannot gather logits with it")
    if args.eval_tasks:
        refuse_it("with eval_tasks: GPT-NeoX cannot gather logits with it")
    kinds = set(expand_attention_config(args.attention_config, args.num_layers))
    if others := sorted(kinds - {METALA, *SOFTMAX_TYPES}):
        refuse_it(f"with layers of type {others[0]}, which need all tokens on a rank")
    if args.partition_activations:
        refuse_it("with partition_activations: DeepSpeed takes the ranks' activations for copies")
    if args.use_qk_layernorm:
        refuse_it("with use_qk_layernorm: GPT-NeoX takes the weights of its own heads for copies")
    parts = args.model_parallel_size * context_size(args)
    if args.seq_length % parts:
        refuse_it(
            f"with seq_length = {args.seq_length}: {parts} ranks cannot each have as many tokens"
        )


def split_tokens() -> None:
    """Hooks into GPT-NeoX what it lacks for sequence parallelism."""
    _sum_partial_gradients()
    _send_own_tokens()


def _send_own_tokens() -> None:
    """Lets each tensor-parallel rank send its own tokens to the next stage of a pipeline. DeepSpeed
    takes the ranks' hidden states for equal: it sends a part of each and gathers the parts."""
    from megatron.neox_arguments.arguments import NeoXArgs

    @overrides(NeoXArgs, "deepspeed_config")
    def config_of_split_tokens(deepspeed_config, self) -> dict:
        config = deepspeed_config(self)
        if has_metala_layers(self) and is_sequence_parallel(self):
            whole = {"pipe_partitioned": False, "grad_partitioned": False}
            config["pipeline"] = {**config.get("pipeline", {}), **whole}
        return config


def _sum_partial_gradients() -> None:
    """Replaces the function by which GPT-NeoX sums, over tensor-parallel ranks, gradients that each
    rank has for its own tokens.

    GPT-NeoX's sums those of norms' weights, twice for the last norm, and leaves out the biases that
    follow a row-parallel product.
    """
    from megatron.model.utils import (
        mark_norms_for_sequence_parallel_grad_sync as mark_norms,
    )
    from megatron.model.utils import (
        reduce_weight_grads_from_model_parallel_region as add_up,
    )
    from megatron.model.word_embeddings import Embedding

    @replaces(mark_norms)
    def mark_all(mark_norms, module: torch.nn.Module, neox_args: Any) -> None:
        if not has_metala_layers(neox_args):
            mark_norms(module, neox_args)
        elif is_sequence_parallel(neox_args):
            embeddings = [m for m in module.modules() if isinstance(m, Embedding)]
            see_all = {id(p) for m in embeddings for p in m.parameters()}
            for p in module.parameters():
                is_whole = getattr(p, "model_parallel", False) or id(p) in see_all
                if p.requires_grad and not is_whole:
                    p.has_partial_gradient = True
                    p.register_hook(add_up)


def add_partial_gradients(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Returns parameters' gradients, those summed over tensor-parallel ranks of which each rank has
    its own tokens' part: what the parameters' hooks do, in one all-reduce for all of them."""
    places = [i for i, p in enumerate(parameters) if getattr(p, "has_partial_gradient", False)]
    if not places:
        return list(gradients)
    from megatron.model.utils import reduce_weight_grads_from_model_parallel_region as add_up

    joined = add_up(torch.cat([gradients[i].flatten() for i in places]))
    parts = joined.split([gradients[i].numel() for i in places])
    sums = dict(zip(places, parts, strict=True))
    return [sums[i].view_as(g) if i in sums else g for i, g in enumerate(gradients)]
