"""The ranks that split the tokens of a sequence: with context parallelism in the whole model, with
sequence parallelism only between the projections of the layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.architecture import MetaLAOptions
from megatron_patch.neox.patching import in_metala_runs

_context: dist.ProcessGroup | None = None


def context_size(neox_args: Any) -> int:
    """Returns the ranks over which context parallelism splits a sequence; 1 without it."""
    return MetaLAOptions.parse(neox_args.metala).context_parallel_size


def is_sequence_parallel(neox_args: Any) -> bool:
    """Returns whether tensor-parallel ranks split the tokens between projections."""
    return bool(neox_args.sequence_parallel) and neox_args.model_parallel_size > 1


def context_group() -> dist.ProcessGroup | None:
    """Returns the ranks among which the tokens that a layer convolves and mixes are split, in the
    order of their tokens; `None` where every rank has whole sequences there."""
    return _context


def layer_group() -> dist.ProcessGroup | None:
    """Returns the ranks with which this rank's layers communicate, by context or, without that, by
    tensor parallelism; `None` for none."""
    from megatron import mpu

    if _context is not None or mpu.get_model_parallel_world_size() == 1:
        return _context
    return mpu.get_model_parallel_group()


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Returns this rank's place in a group and how many ranks that has; (0, 1) for `None`."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def own_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns the part of whole sequences [b, s] that this rank convolves and mixes."""
    rank, ranks = place_in(_context)
    return x.chunk(ranks, dim=1)[rank].contiguous()


def make_token_groups() -> None:
    """Makes the group when GPT-NeoX has made its own."""
    from megatron import mpu
    from megatron.initialize import initialize_megatron

    @in_metala_runs(initialize_megatron)
    def initialize_groups(initialize, neox_args, *args, **kwargs):
        global _context
        # A capture must not register buffers with NCCL: that would wait for the other ranks, one of
        # which may have failed, and memory of `expandable_segments` cannot be registered.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        result = initialize(neox_args, *args, **kwargs)
        _context, size = None, context_size(neox_args)
        if size > 1:
            replicas = dist.get_process_group_ranks(mpu.get_data_parallel_group())
            first = mpu.get_data_parallel_rank() // size * size
            _context = _new_group(replicas[first : first + size])
        return result


def _new_group(ranks: list[int], backend: str | None = None) -> dist.ProcessGroup:
    """Returns this rank's group; every rank calls with the ranks of its own."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, tuple(ranks))
    return dist.new_subgroups_by_enumeration(sorted(set(found)), backend=backend)[0]


def deciding_together(group: dist.ProcessGroup) -> Callable[..., list[bool]]:
    """Returns a function of votes that returns, for each, whether all ranks of the group vote for
    it. They all call it at the same points. The hosts exchange votes and wait for no GPU. Every
    rank of the run calls this with a group of its own."""
    of_hosts = _new_group(dist.get_process_group_ranks(group), backend="gloo")

    def decide(*votes: bool) -> list[bool]:
        least = torch.tensor(votes, dtype=torch.int32, device="cpu")
        dist.all_reduce(least, dist.ReduceOp.MIN, group=of_hosts)
        return [bool(vote) for vote in least]

    return decide
