"""What all tensor-parallel ranks must have alike: parameters that are not split, and the random
state by which they choose tokens.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist


def check_replicas(module: torch.nn.Module, group, source: int) -> None:
    """Ends the run if a parameter without `model_parallel` mark differs in any bit between
    tensor-parallel ranks: the model is then none that could be exported or go on.

    Every rank calls it. Costs one broadcast of these parameters, which are small: norms,
    convolutions, biases after a row-parallel product.

    Args:
        module: the model, of this rank's pipeline stage.
        group: this rank's tensor-parallel group.
        source: global rank of the group's first member.

    Raises:
        SystemExit: on every rank; the first of a group that has gone apart names the first such
            parameter and the ranks.
    """
    drifted = _first_drifted(module, group, source)
    if drifted and dist.get_rank() == source:
        name, ranks = drifted
        print(
            f"MetaLA: {name}: found other values on rank{'s'[: len(ranks) > 1]} "
            f"{', '.join(map(str, ranks))} than on rank {source}, wanted the same on all "
            "tensor-parallel ranks; no checkpoint was written",
            flush=True,
        )
    # The other groups wait for nobody who has left.
    anywhere = torch.tensor([int(drifted is not None)], device=torch.cuda.current_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere.item():
        sys.exit(1)


def _first_drifted(module: torch.nn.Module, group, source: int) -> tuple[str, list[int]] | None:
    if dist.get_world_size(group) == 1:
        return None
    replicated = {
        name: parameter.detach().contiguous().view(-1).view(torch.uint8)
        for name, parameter in module.named_parameters()
        # Those of ZeRO 3 are split over the data-parallel ranks.
        if not getattr(parameter, "model_parallel", False) and not hasattr(parameter, "ds_id")
    }
    if not replicated:
        return None
    own = torch.cat(list(replicated.values()))
    first = own.clone()
    dist.broadcast(first, source, group=group)
    sizes = [len(bits) for bits in replicated.values()]
    differs = torch.stack([part.any() for part in (own != first).split(sizes)]).to(torch.uint8)
    of_ranks = [torch.empty_like(differs) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, differs, group=group)
    differs = torch.stack(of_ranks).bool().cpu()  # [ranks, parameters]
    if not differs.any():
        return None
    index = int(differs.any(0).int().argmax())
    ranks = [dist.get_global_rank(group, int(rank)) for rank in differs[:, index].nonzero()]
    return list(replicated)[index], ranks


def share_random_state(group, source: int) -> None:
    """Gives all ranks of a tensor-parallel group the first one's random state: each samples for
    itself, and they must sample the same token. Those of a checkpoint may have gone apart."""
    if dist.get_world_size(group) == 1:
        return
    state = torch.cuda.get_rng_state().to(torch.cuda.current_device())
    dist.broadcast(state, source, group=group)
    torch.cuda.set_rng_state(state.cpu())
