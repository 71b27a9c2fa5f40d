"""The files of a checkpoint that a run will load, looked at before any rank exists: a rank that
misses one ends in a traceback that names none."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from megatron_patch.architecture import SettingsError


def check_files(
    args, step: Path, stage: int, model_ranks: int | None, data_ranks: int | None
) -> None:
    """Checks that all files are there that the layout of the settings needs, and that none is cut
    off: `torch.save` writes a zip file, whose list of contents stands at its end. Reads no tensors.

    Args:
        args: GPT-NeoX's settings.
        step: the `global_stepN` folder.
        stage: of ZeRO, 0 for a program that does not train.
        model_ranks, data_ranks: by how many the checkpoint was written, as far as it says.

    Raises:
        SettingsError: names the first file that is missing or damaged.
    """
    names = set()
    for name in _names(args, stage, model_ranks, data_ranks or 1):
        if reason := _damage(step / name):
            raise SettingsError(f"load: {step / name}: {reason}")
        names.add(name)
    # DeepSpeed counts the files of each of these kinds, and takes others for another layout.
    kinds = ("mp_rank_*", "layer_*") if args.pipe_parallel_size else ("mp_rank_*",)
    for file in sorted(file for kind in kinds for file in step.glob(f"{kind}model_states.pt")):
        if stage != 3 and file.name not in names:
            raise SettingsError(f"load: {file}: a file of no rank or layer of this checkpoint")


def _names(args, stage: int, model_ranks: int | None, data_ranks: int) -> Iterator[str]:
    tensor_ranks = max(args.model_parallel_size, 1)
    model_ranks = model_ranks or tensor_ranks * max(args.pipe_parallel_size, 1)
    if stage == 3:
        for rank in range(data_ranks):
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    else:
        for rank in range(model_ranks):
            yield f"mp_rank_{rank:02d}_model_states.pt"
    if args.pipe_parallel_size:
        for layer in _layers(args):
            for rank in range(tensor_ranks):
                yield f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
    if stage == 3 or (stage and not args.finetune):
        prefix = "bf16_" if args.precision == "bfloat16" else ""
        for data_rank in range(data_ranks):
            for rank in range(model_ranks):
                yield f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt"


def _layers(args) -> list[int]:
    """GPT-NeoX's layers that are modules: embedding, blocks, norm, and the head if it has weights
    of its own. Functions, which have no file, stand before and after the blocks."""
    blocks = [2 + block for block in range(args.num_layers)]
    head = [args.num_layers + 4] if args.no_weight_tying else []
    return [0, *blocks, args.num_layers + 3, *head]


def _damage(file: Path) -> str | None:
    """What is wrong with a file that `torch.save` wrote, as far as its two ends tell."""
    if not file.exists():
        return "the file is missing"
    if not file.is_file():
        return "no regular file"
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
        if start.startswith(b"\x80"):  # the format before PyTorch 1.6
            return None
        if start == b"PK\x03\x04":
            with zipfile.ZipFile(file):
                return None
    except zipfile.BadZipFile:
        pass
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "truncated or no PyTorch file"
