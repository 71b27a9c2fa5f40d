"""Checkpoints that are safe to write and to read.

GPT-NeoX lets two runs save to one folder, saves replicas that have drifted apart, deletes other
folders than old checkpoints, and reads damaged files. The launcher of a run holds the folder `save`
while it lives, and the ranks save there only as long as it does.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.notices import say
from megatron_patch.neox.packages import is_installed
from megatron_patch.neox.patching import in_metala_runs, repairs, swapped
from megatron_patch.neox.run_settings import program
from megatron_patch.neox.this_process import is_first_here
from megatron_patch.save_folder import held, holder, try_saving
from megatron_patch.steps import STEP, saved_steps
from megatron_patch.torch_file import damaged_record

HOLDER = "METALA_HOLDER"  # the variable that tells the ranks which run holds the save folder


# ---- The folder belongs to one run


def hold_save(args: Any) -> None:
    """Holds the folder `save` for as long as this process, the launcher, lives. SIGTERM then ends
    the process as Ctrl-C does, so that the folder is released. Raises a SettingsError if nothing
    can be saved or uploaded, or another run holds the folder."""
    if not args.save or not args.user_script or program(args) != "train.py":
        return
    for package in ("boto3", "hf_transfer") if args.s3_path else ():
        if not is_installed(package):
            raise SettingsError(
                f"s3_path: found {args.s3_path}, wanted none without the package {package}, with "
                "which GPT-NeoX uploads checkpoints"
            )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    until_the_end = ExitStack()
    os.environ[HOLDER] = until_the_end.enter_context(held(args.save))
    atexit.register(until_the_end.close)


def check_save(args: Any) -> None:
    """Ends the run if a host cannot write to `save`, which may be another folder there. Every rank
    calls this after torch.distributed is initialised. Raises SystemExit on every rank."""
    if not args.save or program(args) != "train.py":
        return
    reason = None
    if is_first_here():
        try:
            try_saving(args.save)
        except SettingsError as error:
            reason = str(error)
    end_all_if(reason)


@repairs("locked save folder", "megatron.initialize:initialize_megatron")
def check_save_at_start() -> None:
    """Checks the folder when GPT-NeoX has initialised torch.distributed."""
    from megatron.initialize import initialize_megatron

    @in_metala_runs(initialize_megatron)
    def initialize_and_check_save(initialize_megatron, neox_args, *args, **kwargs):
        result = initialize_megatron(neox_args, *args, **kwargs)
        check_save(neox_args)
        return result


def check_holder(save: str) -> None:
    """Ends the run if another run holds `save`: the launcher was lost with its host, or somebody
    removed the lock. Every rank calls this before it saves. Raises SystemExit on every rank."""
    reason = None
    if dist.get_rank() == 0 and HOLDER in os.environ:
        if (found := holder(save)) not in (None, os.environ[HOLDER]):
            reason = f"save: {save} is now another run's, {found}; no checkpoint was written"
    end_all_if(reason)


def end_all_if(reason: str | None) -> None:
    """Ends every rank if any rank gives a reason, which that rank prints. A rank that left alone
    would leave the others waiting in their next collective."""
    if reason:
        print(f"MetaLA: {reason}", flush=True)
    anywhere = torch.tensor([int(reason is not None)], device=torch.cuda.current_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere.item():
        sys.exit(1)


# ---- Replicas are equal


def check_replicas(module: torch.nn.Module, group, source: int) -> None:
    """Ends the run if a replicated parameter (one without the `model_parallel` mark) differs in any
    bit between tensor-parallel ranks. Such a model can neither be exported nor go on.

    Every rank calls this with its `group`, whose first member is the global rank `source`. It
    broadcasts the replicated parameters once; they are small: norms, convolutions, biases after a
    row-parallel product. Raises SystemExit on every rank; the first rank of a group with a
    difference names the first such parameter and the ranks.
    """
    reason = None
    drifted = _first_drifted(module, group, source)
    if drifted and dist.get_rank() == source:
        name, ranks = drifted
        which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        reason = (
            f"{name}: found other values on {which} than on rank {source}, wanted the same on all "
            "tensor-parallel ranks; no checkpoint was written"
        )
    end_all_if(reason)


def _first_drifted(module: torch.nn.Module, group, source: int) -> tuple[str, list[int]] | None:
    """Returns the first replicated parameter that differs, and the global ranks where it does."""
    if dist.get_world_size(group) == 1:
        return None
    replicated = {
        name: parameter.detach().contiguous().view(-1).view(torch.uint8)
        for name, parameter in module.named_parameters()
        # ZeRO 3 splits parameters with a `ds_id` over the data-parallel ranks.
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


@repairs("equal replicas", "megatron.checkpointing:save_checkpoint")
def check_before_saving() -> None:
    """Checks the replicas, and who holds the folder, before each checkpoint."""
    from megatron import mpu
    from megatron.checkpointing import save_checkpoint

    @in_metala_runs(save_checkpoint)
    def save_equal_replicas(save_checkpoint, neox_args, iteration, model, *args, **kwargs):
        group, source = mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank()
        check_replicas(model.module, group, source)
        check_holder(neox_args.save)
        try:
            save_checkpoint(neox_args, iteration, model, *args, **kwargs)
        except (OSError, RuntimeError) as error:
            if reason := _why_not_written(error):
                free = shutil.disk_usage(neox_args.save).free / 1e9
                sys.exit(
                    f"MetaLA: save: the checkpoint of iteration {iteration} was not written to "
                    f"{neox_args.save}, which has {free:.1f} GB free: {reason}; those before it "
                    "are whole"
                )
            raise


def _why_not_written(error: OSError | RuntimeError) -> str | None:
    """Returns why a file was not written, `None` if the error says nothing of files. PyTorch's
    writer does not pass on what the system said."""
    text = str(error)
    if isinstance(error, ConnectionError):  # of another rank, or of a service that keeps copies
        return None
    if isinstance(error, OSError):
        return text
    return "the disk takes no more" if re.search("inline_container|iostream", text) else None


# ---- Old checkpoints alone are deleted


def delete_old_checkpoints(save_dir: str, n_to_keep: int) -> None:
    """Deletes all but the last `n_to_keep` checkpoints up to the one that `latest` names.

    GPT-NeoX's own function looks for "global_step" anywhere in the path, so a `save` below such a
    folder loses everything in it. It also deletes the step just written if `save` holds later steps
    of a run that was taken back.
    """
    if dist.get_rank() != 0:
        return
    folder = Path(save_dir)
    latest = STEP.fullmatch((folder / "latest").read_text().strip())
    steps = [n for n in saved_steps(folder) if latest is None or n <= int(latest[1])]
    for old in (folder / f"global_step{step}" for step in steps[:-n_to_keep]):
        say(f"keep_last_n_checkpoints: deleting {old}")
        shutil.rmtree(old, ignore_errors=True)  # training goes on
        if old.exists():
            say(f"keep_last_n_checkpoints: {old} cannot be deleted whole")


# megatron/checkpointing.py:158
@repairs(
    "keep_last_n_checkpoints",
    "megatron.checkpointing:delete_old_checkpoints",
    "re.search(ckpt_dir_regex, i)",
)
def delete_old_checkpoints_alone() -> None:
    """Lets `save_checkpoint` delete by the function above."""
    from megatron import checkpointing

    @in_metala_runs(checkpointing.save_checkpoint)
    def save_and_delete(save_checkpoint, neox_args, *args, **kwargs):
        with swapped(checkpointing, "delete_old_checkpoints", delete_old_checkpoints):
            save_checkpoint(neox_args, *args, **kwargs)


# ---- Damaged files are not loaded


# deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py:37
@repairs(
    "damaged checkpoints",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.load",
    "torch.load(",
)
def refuse_damaged_files() -> None:
    """Compares each file that a rank loads with the CRC-32 that it carries. `torch.load` does not,
    and takes a flipped bit for another weight.

    A damaged file ends the rank with a line. Each file is read once more, at 1 to 3 GB/s a rank;
    the second time it comes from the system's cache.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from megatron.checkpointing import load_checkpoint

    load = TorchCheckpointEngine.load

    def load_undamaged(self, path, *args, **kwargs):
        if Path(path).is_file() and (record := damaged_record(Path(path))):
            sys.exit(
                f"MetaLA: load: found {path} damaged, its {record} is not what was saved (CRC-32), "
                "wanted the file as it was written, or another checkpoint, by iteration"
            )
        return load(self, path, *args, **kwargs)

    @in_metala_runs(load_checkpoint)
    def load_compared(load_checkpoint, neox_args, *args, **kwargs):
        with swapped(TorchCheckpointEngine, "load", load_undamaged):
            return load_checkpoint(neox_args, *args, **kwargs)
