"""Context parallelism in GPT-NeoX, which has none: `metala: {context_parallel_size: N}` splits the
tokens of each sequence over N ranks.

To GPT-NeoX and DeepSpeed these ranks stay data-parallel: they hold the same parameters, and
gradients are averaged over all of them. N neighbours form a group (`token_groups.py`). Three things
differ, and are hooked in here:

- All ranks of a group read the same samples, so a batch has 1 / N of the usual number.
- Each rank keeps its slice of the tokens.
- The loss divides by the mean number of tokens that count on the group's ranks (`loss.py`). The
  mean over ranks, which DeepSpeed takes of gradients, is then that of the whole sequences.

What the layers exchange is in `ops/context_parallel.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.architecture import METALA, MetaLAOptions, refuse
from megatron_patch.architecture_neox import expand_attention_config
from megatron_patch.neox.patching import in_metala_runs, overrides, replaces, swapped
from megatron_patch.neox.token_groups import context_group, context_size, own_tokens


def mean_over_context(count: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a number over the ranks of this rank's group."""
    if (group := context_group()) is None:
        return count
    count = count.clone()
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)


def check_context_parallel(args: Any, program: str) -> None:
    """Raises a SettingsError if a run of `program` cannot split its sequences."""
    options = MetaLAOptions.parse(args.metala)
    size = options.context_parallel_size
    if size == 1:
        return

    def refuse_size(wanted: str) -> None:
        refuse("metala.context_parallel_size", size, wanted)

    if program != "train.py":
        refuse_size(f"1 in {program}, where each rank reads whole sequences")
    kinds = set(expand_attention_config(args.attention_config, args.num_layers)) - {METALA}
    if kinds:
        refuse_size(f"1 with layers of type {sorted(kinds)[0]}, which need all tokens on a rank")
    least = max(options.conv_width - 1, 2)  # a mask of one token says nothing of documents
    if args.seq_length % size or args.seq_length // size < least:
        refuse_size(
            f"a divisor of seq_length = {args.seq_length} that leaves a rank at least {least} "
            "tokens, as many as the convolution reads back"
        )
    for name in ("eval_tasks", "autotuning", "fp16_lm_cross_entropy"):
        if found := getattr(args, name):
            refuse(name, found, f"none with metala.context_parallel_size = {size}")
    if args.global_num_gpus:
        check_context_ranks(args)


def check_context_ranks(args: Any) -> None:
    """Raises a SettingsError if the ranks cannot be divided into groups."""
    size = context_size(args)
    others = max(args.pipe_parallel_size, 1) * max(args.model_parallel_size, 1)
    if args.global_num_gpus % (others * size):
        refuse(
            "metala.context_parallel_size",
            size,
            f"a divisor of the {args.global_num_gpus // others} data-parallel ranks",
        )


def split_sequences() -> None:
    """Hooks everything of this module into GPT-NeoX."""
    _count_samples_by_group()
    _read_by_group()
    _keep_own_tokens()


def _count_samples_by_group() -> None:
    """Counts the ranks of a group as one where GPT-NeoX derives batch sizes. DeepSpeed multiplies
    by all data-parallel ranks, so it is told a batch of N times the samples."""
    from megatron.neox_arguments.arguments import NeoXArgs

    @overrides(NeoXArgs, "calculate_derived")
    def derive_by_group(derive, self) -> None:
        size = context_size(self)
        names = ("calculate_batch_parameters", "check_batch_parameters")
        if size > 1:
            for name in names:
                setattr(self, name, _with_fewer_ranks(getattr(NeoXArgs, name), size))
        derive(self)
        for name in names:
            vars(self).pop(name, None)

    @overrides(NeoXArgs, "deepspeed_config")
    def config_of_all_ranks(deepspeed_config, self) -> dict:
        config = deepspeed_config(self)
        # The launcher hands this mapping to the ranks, which read GPT-NeoX's batch size from it.
        if "train_batch_size" in config and dist.is_initialized():
            config["train_batch_size"] *= context_size(self)
        return config


def _with_fewer_ranks(function, size: int):
    return lambda dp_world_size, **kwargs: function(dp_world_size=dp_world_size / size, **kwargs)


def _read_by_group() -> None:
    from megatron import mpu
    from megatron.data.data_utils import make_data_loader

    @replaces(make_data_loader)
    def make_loader_of_group(make_data_loader, dataset, neox_args):
        size = context_size(neox_args)
        ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        with (
            swapped(mpu, "get_data_parallel_world_size", lambda: ranks // size),
            swapped(mpu, "get_data_parallel_rank", lambda: rank // size),
        ):
            return make_data_loader(dataset, neox_args)


def _keep_own_tokens() -> None:
    from megatron.training import _get_batch

    @in_metala_runs(_get_batch)
    def get_own_tokens(get_batch, neox_args, *args, **kwargs):
        *by_token, attention_mask, position_ids = get_batch(neox_args, *args, **kwargs)
        # Boundaries of documents, in the mask's place, are this rank's (`attention_mask.py`).
        return *map(own_tokens, by_token), attention_mask, own_tokens(position_ids)
