"""Writing the optimizer's states of a GPT-NeoX checkpoint in another layout, as DeepSpeed would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convert.command import ConvertError
from convert.optimizer_layout import Group, Layout, groups_by_stage, parameter_name
from convert.optimizer_reader import MASTER, PARTITION_NAME, OptimizerReader
from convert.tensor_table import tensor_table
from megatron_patch.architecture import WHOLE, Architecture

# GPT-NeoX seeds a tensor-parallel rank's random states with the sum of the run's seed, this, and
# the rank.
_TRACKER_SEED = 2718


class OptimizerWriter:
    """Writes the states of `reader` for another layout.

    Args:
        shape: the model's shape, with the padded vocabulary of the new layout.
        settings: the new layout's settings.
        stage: the ZeRO stage that will load them; 0 only if the reader's is.
    """

    def __init__(
        self,
        reader: OptimizerReader,
        shape: Architecture,
        layout: Layout,
        settings: Mapping[str, Any],
        stage: int,
    ):
        self.reader, self.shape, self.layout, self.stage = reader, shape, layout, stage
        self.seed = settings.get("seed", 1234)
        self.table = tensor_table(shape)
        self.groups = groups_by_stage(shape, self.table, settings, layout)
        names = {group.name for groups in self.groups for group in groups}
        if missing := names - reader.hyperparameters.keys():
            raise ConvertError(f"{reader.source.step}: holds no states of {min(missing)}")

    def rank_states(self, number: int, args: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a model rank's mp_rank file holds besides the model. `args` are the settings
        that GPT-NeoX compares."""
        stage, rank = divmod(number, self.layout.tensor_parallel)
        before = self.reader.layout
        source = self.reader.rank_states[
            min(stage, before.stages - 1) * before.tensor_parallel
            + min(rank, before.tensor_parallel - 1)
        ]
        states = {
            **source,
            "args": {**source.get("args", {}), **args},
            "optimizer": None if self.stage else self._without_zero(stage, rank),
            "param_shapes": self._param_shapes(stage) if self.stage else None,
            "dp_world_size": self.layout.data_parallel,
            "mp_world_size": self.layout.tensor_parallel * self.layout.stages,
            "ds_config": {
                **source["ds_config"],
                **batch(source["ds_config"], self.layout.data_parallel),
                "zero_optimization": {"stage": self.stage},
            },
        }
        if "checkpoint_parallel_dimensions" in source:
            states["checkpoint_parallel_dimensions"] = {
                "pp_degree": self.layout.stages,
                "tp_degree": self.layout.tensor_parallel,
            }
        if rank >= before.tensor_parallel and "rng_tracker_states" in source:
            states["rng_tracker_states"] = {
                name: _state_of_rank(state, self.seed + _TRACKER_SEED, rank)
                for name, state in source["rng_tracker_states"].items()
            }
        return states

    def write_partitions(self, step: Path) -> None:
        """Writes ZeRO's files, one after the other; none without ZeRO."""
        for number, stage, rank in self.layout.model_ranks() if self.stage else ():
            for data_rank in range(self.layout.data_parallel):
                groups = self.groups[stage]
                flat = {
                    kind: [self._partition(group, kind, rank, data_rank) for group in groups]
                    for kind in self.reader.kinds
                }
                name = PARTITION_NAME.format(self.reader.prefix, data_rank, number)
                torch.save(self._zero_file(groups, flat, data_rank), step / name)

    def _zero_file(
        self, groups: list[Group], flat: Mapping[str, list[torch.Tensor]], data_rank: int
    ) -> dict[str, Any]:
        states = {
            index: {**_counts(self.reader), **{k: flat[k][index] for k in flat if k != MASTER}}
            for index in range(len(groups))
        }
        zero = {
            **_with_classes(self.reader.zero_states),
            "base_optimizer_state": {
                "state": states,
                "param_groups": self._param_groups(groups, [1] * len(groups)),
            },
            "single_partition_of_fp32_groups": flat[MASTER],
            "zero_stage": self.stage,
            "group_paddings": [
                min(max((data_rank + 1) * width - group.size, 0), width)
                for group in groups
                if (width := group.partition(self.layout.data_parallel))
            ],
            "partition_count": [self.layout.data_parallel] * len(groups),
            "ds_version": self.reader.rank_states[0]["ds_version"],
        }
        return {"optimizer_state_dict": zero, "ds_version": zero["ds_version"]}

    def _partition(self, group: Group, kind: str, rank: int, data_rank: int) -> torch.Tensor:
        """Returns one data-parallel rank's partition of a flat group, padded with zeros."""
        width = group.partition(self.layout.data_parallel)
        flat, left = torch.zeros(width), data_rank * width
        for rule, start, size in group.places():
            first, last = max(start, left), min(start + size, left + width)
            if first < last:
                full = self.reader.full(rule, kind)
                shard = rule.shard(full, self.layout.tensor_parallel, rank).reshape(-1)
                flat[first - left : last - left] = shard[first - start : last - start]
        return flat

    def _without_zero(self, stage: int, rank: int) -> dict[str, Any]:
        groups = self.groups[stage]
        rules = [rule for group in groups for rule in group.rules]
        states = {}
        for index, rule in enumerate(rules):
            shards = {
                kind: rule.shard(self.reader.full(rule, kind), self.layout.tensor_parallel, rank)
                for kind in self.reader.kinds
            }
            copies = {kind: shard.clone() for kind, shard in shards.items()}
            states[index] = {**_counts(self.reader), **copies}
        sizes = [len(group.rules) for group in groups]
        return {"state": states, "param_groups": self._param_groups(groups, sizes)}

    def _param_groups(self, groups: list[Group], sizes: list[int]) -> list[dict[str, Any]]:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [
            {
                **self.reader.hyperparameters[group.name],
                "params": list(range(start, start + size)),
            }
            for group, start, size in zip(groups, starts, sizes, strict=True)
        ]

    def _param_shapes(self, stage: int) -> list[dict[str, torch.Size]]:
        return [
            {
                parameter_name(rule, self.shape, self.layout): torch.Size(shape)
                for rule, shape in group.named_shapes()
            }
            for group in self.groups[stage]
        ]


def batch(ds_config: Mapping[str, Any], data_parallel: int) -> dict[str, int]:
    """Returns the settings that keep the number of sequences of a step with `data_parallel` ranks:
    `train_batch_size` as it was, and the largest micro-batch up to what it was that divides a
    rank's share. Raises a ConvertError if the ranks cannot have equal shares."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu")
    size, micro = (ds_config.get(name) for name in names)
    if not (WHOLE.accepts(size) and WHOLE.accepts(micro)):
        raise ConvertError(f"ds_config: found no {' and '.join(names)} in the checkpoint")
    if size % data_parallel:
        raise ConvertError(f"data parallel {data_parallel} does not divide {names[0]}, {size}")
    share = size // data_parallel
    micro = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
    values = (size, micro, share // micro)
    return dict(zip((*names, "gradient_accumulation_steps"), values, strict=True))


def _counts(reader: OptimizerReader) -> dict[str, Any]:
    """Returns a copy of the states without numbers for each weight."""
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in reader.counts.items()}


def _state_of_rank(state: torch.Tensor, seed: int, rank: int) -> torch.Tensor:
    """Returns a random state for a tensor-parallel rank that the old layout did not have, so that
    its dropout differs from the others'. On a GPU a state is a seed and an offset of 8 bytes each,
    else that of PyTorch's generator."""
    if state.numel() == 16:
        numbers = state.clone().view(torch.int64)
        numbers[0] += rank
        return numbers.view(torch.uint8)
    return torch.Generator().manual_seed(seed + rank).get_state()


def _with_classes(states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ZeRO's states with DeepSpeed's own class in place of the stand-in that a loss scaler
    was read as. The constant scaler of float32 and bfloat16 is left out: DeepSpeed makes one."""
    scaler = states.get("loss_scaler")
    states = {key: value for key, value in states.items() if key != "loss_scaler"}
    if type(scaler).__name__ == "DynamicLossScaler":
        try:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
        except ImportError:
            raise ConvertError(
                "DeepSpeed is not installed, which writes the loss scaler of fp16"
            ) from None
        states["loss_scaler"] = DynamicLossScaler.__new__(DynamicLossScaler)
        vars(states["loss_scaler"]).update(vars(scaler))
    return states
