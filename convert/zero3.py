"""Reading DeepSpeed checkpoints of ZeRO stage 3, where each rank holds a part of every tensor.

Each rank writes two files:

    zero_pp_rank_{rank}_mp_rank_00_model_states.pt: the names, shapes and training dtypes of all
        tensors, without data
    zero_pp_rank_{rank}_mp_rank_00_optim_states.pt (or bf16_zero_…): the rank's parts in float32, in
        "fp32_flat_groups", one flat tensor per entry of "param_shapes"

DeepSpeed flattens each tensor, pads it to a multiple of the number of ranks, and cuts it evenly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.command import ConvertError
from convert.files import DTYPES, check_bytes, load_torch_file, plain_tensors, saved_name
from megatron_patch.architecture import WHOLE, shown

MODEL_FILE = re.compile(r"zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
# Pages that were read from a mapped file count as this process's memory until the file is closed,
# so files are opened again after this many bytes.
MAPPED_BYTES = 512 * 2**20


@dataclass(frozen=True)
class FlatSlice:
    """The place of a tensor: `size` numbers from `start` in each rank's flat group."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    start: int
    size: int


class Zero3Checkpoint:
    """The ZeRO stage 3 files of one iteration, checked when it is opened; `model_files` has them in
    rank order. Raises a ConvertError if a file is missing, damaged, renamed, or from a run with
    other ranks."""

    def __init__(self, step: Path):
        self.step = step
        self.model_files = self._find(MODEL_FILE)
        self._optimizer_files = self._find(OPTIMIZER_FILE)
        states = [load_torch_file(file, step.parent) for file in self.model_files]
        for file, held in zip(self.model_files, states, strict=True):
            self._check_ranks(file, held.get("dp_world_size"), len(states))
        if len(self._optimizer_files) != len(states):
            raise ConvertError(
                f"{step}: found {len(self._optimizer_files)} files *_optim_states.pt, wanted "
                f"{len(states)}: under ZeRO stage 3 they hold the weights"
            )
        self._groups: list[list[torch.Tensor]] = []
        self._bytes_read = 0
        self._slices = self._find_slices(states[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by name, on the meta device."""
        return {
            name: torch.empty(part.shape, dtype=part.dtype, device="meta")
            for name, part in self._slices.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Returns a full tensor, rounded to the dtype that the model computed with."""
        part = self._slices[name]
        shards = [
            groups[part.group][part.start : part.start + part.size] for groups in self._open()
        ]
        self._bytes_read += sum(shard.nbytes for shard in shards)
        flat = torch.cat([shard.to(part.dtype) for shard in shards])
        return flat[: math.prod(part.shape)].view(part.shape)

    def _find(self, pattern: re.Pattern) -> list[Path]:
        """Returns the files whose names match, in rank order."""
        found: dict[int, Path] = {}
        for path in sorted(self.step.iterdir()):
            if not (match := pattern.fullmatch(path.name)):
                continue
            rank, tensor_rank = map(int, match.groups())
            if tensor_rank:
                raise ConvertError(
                    f"{path}: ZeRO stage 3 with model_parallel_size above 1, which GPT-NeoX "
                    "does not train"
                )
            if rank in found:
                raise ConvertError(
                    f"{path}: {found[rank].name} lies beside it: the files of two runs are mixed"
                )
            saved = saved_name(path, self.step.parent)
            if saved and pattern.fullmatch(saved) and saved != path.name:
                raise ConvertError(f"{path}: the file was saved as {saved}: it was renamed")
            found[rank] = path
        for rank in range(max(found, default=-1) + 1):
            if rank not in found:
                example = next(iter(found.values())).name
                raise ConvertError(f"{self.step}: rank {rank} has no file such as {example}")
        return [found[rank] for rank in sorted(found)]

    @staticmethod
    def _check_ranks(file: Path, found: object, ranks: int) -> None:
        if not isinstance(found, int) or found != ranks:
            raise ConvertError(
                f"{file}: saved by one of {shown(found)} data-parallel ranks, but the folder has "
                f"files of {ranks}"
            )

    def _open(self) -> list[list[torch.Tensor]]:
        """Returns each rank's flat groups, memory-mapped."""
        if not self._groups or self._bytes_read > MAPPED_BYTES:
            self._groups, self._bytes_read = [], 0
            self._groups = [self._flat_groups(file) for file in self._optimizer_files]
        return self._groups

    def _flat_groups(self, file: Path) -> list[torch.Tensor]:
        state = load_torch_file(file, self.step.parent).get("optimizer_state_dict")
        groups = state.get("fp32_flat_groups") if isinstance(state, Mapping) else None
        if not isinstance(groups, list):
            raise ConvertError(f"{file}: holds no fp32_flat_groups of ZeRO stage 3")
        self._check_ranks(file, state.get("partition_count"), len(self._optimizer_files))
        named = {f"fp32_flat_groups[{i}]": group for i, group in enumerate(groups)}
        return list(plain_tensors(named, file).values())

    def _find_slices(self, states: Mapping[str, Any]) -> dict[str, FlatSlice]:
        """Returns the place of every tensor, and checks it against all flat groups."""
        file, ranks = self.model_files[0], len(self.model_files)
        module, shapes = states.get("module"), states.get("param_shapes")
        if not isinstance(module, Mapping) or not isinstance(shapes, list):
            raise ConvertError(f"{file}: holds no module and param_shapes of ZeRO stage 3")
        slices: dict[str, FlatSlice] = {}
        sizes = []
        for group, by_name in enumerate(shapes):
            start = 0
            if not isinstance(by_name, Mapping):
                raise ConvertError(f"{file}: param_shapes[{group}] holds no shapes by name")
            for name, shape in by_name.items():
                tensor = module.get(name)
                if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
                    raise ConvertError(
                        f"{file}: {shown(name)} is in param_shapes, but the module has no "
                        "floating-point tensor of this name"
                    )
                if (
                    not isinstance(shape, (list, tuple))
                    or len(shape) > 8
                    or not all(map(WHOLE.accepts, shape))
                ):
                    raise ConvertError(f"{file}: param_shapes: {name} has shape {shown(shape)}")
                size = -(-math.prod(shape) // ranks)
                slices[name] = FlatSlice(tuple(shape), tensor.dtype, group, start, size)
                start += size
            sizes.append(start)
        for name in module.keys() - slices.keys():
            raise ConvertError(f"{file}: {shown(name)} is in the module and not in param_shapes")
        for path in self._optimizer_files:
            groups = self._flat_groups(path)
            if (found := [list(group.shape) for group in groups]) != [[size] for size in sizes]:
                raise ConvertError(
                    f"{path}: fp32_flat_groups have sizes {shown(found)}, but by {file.name} they "
                    f"are {shown([[size] for size in sizes])}"
                )
            for i, group in enumerate(groups):
                check_bytes(path, f"fp32_flat_groups[{i}]", group)
        return slices
