"""Reading the optimizer's states of a GPT-NeoX checkpoint, whatever the layout.

DeepSpeed keeps them in one of two forms:

    without ZeRO, in float32: under "optimizer" in each mp_rank file, a `state_dict` of PyTorch
    ZeRO 1 and 2: in files of their own, [bf16_]zero_pp_rank_{data}_mp_rank_{model}_optim_states.pt,
        each data-parallel rank's partition of the flat groups: "single_partition_of_fp32_groups"
        holds the weights in float32, "base_optimizer_state" the rest

`convert.optimizer_layout` says where in a flat group each tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convert.command import ConvertError
from convert.files import check_bytes, load_torch_file, plain_tensors
from convert.neox_reader import RANK_FILE_NAME, NeoXCheckpoint
from convert.optimizer_layout import Group, Layout, groups_by_stage, parameter_name
from convert.tensor_table import Split, TensorRule, fit_vocabulary
from convert.zero3 import MAPPED_BYTES
from megatron_patch.architecture import WHOLE, refuse, shown
from megatron_patch.architecture_neox import with_defaults

PARTITION_NAME = "{}zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt"
PARTITION_FILE = re.compile(r"(bf16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
MASTER = "fp32"  # the weights in float32 that the optimizer changes
# States with a number for each weight: those of Adam and Lion.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class OptimizerReader:
    """The optimizer's states of one iteration, checked when it is opened.

    Attributes:
        layout: the layout that saved them.
        stage: the ZeRO stage.
        prefix: what ZeRO's file names begin with, `bf16_` or nothing.
        kinds: the states with a number for each weight: `MASTER`, and some of `MOMENTS`.
        counts: the states without, by name: `step`.
        hyperparameters: those of each group of parameters, by the group's name.
        rank_states: what each model rank's mp_rank file holds besides tensors.
        zero_states: what ZeRO's first file holds besides states of weights.

    Raises:
        ConvertError: a file is missing, damaged or of another layout, or the states are of a kind
            that cannot be split anew.
    """

    def __init__(self, source: NeoXCheckpoint):
        self.source = source
        if source.form == "ZeRO 3":
            wanted = "0, 1 or 2 with --with-optimizer"
            refuse("zero_optimization.stage", 3, wanted)
        args = with_defaults(source.settings)
        layout = Layout(source.tensor_parallel, args.pipe_parallel_size, 1)
        self.rank_states = [self._rank_states(number) for number, _, _ in layout.model_ranks()]
        first = self.rank_states[0]
        if first.get("lr_scheduler") is None:
            raise ConvertError(
                f"{source.step}: holds no optimizer states; leave out --with-optimizer"
            )
        self.stage = self._zero_stage(first)
        data_parallel = first.get("dp_world_size")
        if not WHOLE.accepts(data_parallel) or data_parallel > 100_000:
            raise ConvertError(f"{source.step}: found dp_world_size {shown(data_parallel)}")
        self.layout = Layout(layout.tensor_parallel, layout.pipeline_parallel, data_parallel)
        self.groups = groups_by_stage(source.shape, source.table, source.settings, self.layout)
        self._stage_of: dict[tuple[int, str], list[int]] = {}
        for stage, groups in enumerate(self.groups):
            for group in groups:
                for rule in group.rules:
                    self._stage_of.setdefault((rule.layer, rule.name), []).append(stage)
        self._open_files: dict[Path, Any] = {}
        self._compared: set[tuple[Path, str]] = set()
        self._bytes_read = 0
        self.prefix = "" if self.stage == 0 else self._find_prefix()
        self.hyperparameters: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, Any] = {}
        self.kinds: tuple[str, ...] = ()
        self.zero_states: dict[str, Any] = {}
        for number, stage, _ in self.layout.model_ranks():
            self._check_names(number, self.groups[stage])
            for data_rank in range(data_parallel if self.stage else 1):
                self._check_file(number, data_rank, self.groups[stage])

    def full(self, rule: TensorRule, kind: str) -> torch.Tensor:
        """Returns a state of a tensor over all ranks, in float32. The rule may be of a table with
        another vocabulary size. Raises a ConvertError if copies on several ranks differ."""
        stages = self._stage_of[rule.layer, rule.name]
        copies = []
        for stage in stages:
            shards, files = [], []
            for rank in range(self.layout.tensor_parallel):
                number = stage * self.layout.tensor_parallel + rank
                shards.append(self._shard(number, self.groups[stage], rule, kind))
                files.append(self._file(number, 0))
            copies.append(rule.merge(shards, files))
        if any(not torch.equal(copies[0], copy) for copy in copies[1:]):  # a tied embedding
            raise ConvertError(
                f"layer {rule.layer}: {kind} of {rule.name} differs between pipeline stages "
                f"{stages[0]} and {stages[-1]}, wanted the same"
            )
        return fit_vocabulary(copies[0], rule.shape[0]) if rule.split is Split.VOCAB else copies[0]

    def _shard(self, number: int, groups: list[Group], rule: TensorRule, kind: str) -> torch.Tensor:
        """Returns one model rank's shard of a state."""
        for index, group in enumerate(groups):
            for place, (other, start, size) in enumerate(group.places()):
                if (other.layer, other.name) == (rule.layer, rule.name):
                    shape = group.shapes()[place]
                    if not self.stage:
                        before = sum(len(g.rules) for g in groups[:index])
                        return self._read(number, 0, before + place, kind)
                    width = group.partition(self.layout.data_parallel)
                    parts = []
                    for data_rank in range(start // width, (start + size - 1) // width + 1):
                        part = self._read(number, data_rank, index, kind)
                        left = data_rank * width
                        parts.append(part[max(start - left, 0) : start + size - left])
                    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)
        raise AssertionError(rule.name)  # `_stage_of` knows the stage

    def _read(self, number: int, data_rank: int, index: int, kind: str) -> torch.Tensor:
        """Returns a state, memory-mapped, after comparing it with its CRC-32 once."""
        if self._bytes_read > MAPPED_BYTES:
            self._open_files, self._bytes_read = {}, 0
        file = self._file(number, data_rank)
        if file not in self._open_files:
            self._open_files[file] = self._tensors(number, data_rank)
        name = f"{kind} {index}"
        tensor = self._open_files[file][name]
        if (file, name) not in self._compared:
            check_bytes(file, name, tensor)
            self._compared.add((file, name))
        self._bytes_read += tensor.nbytes
        return tensor

    # ---- Files

    def _file(self, number: int, data_rank: int) -> Path:
        if not self.stage:
            return self.source.step / RANK_FILE_NAME.format(number)
        return self.source.step / PARTITION_NAME.format(self.prefix, data_rank, number)

    def _rank_states(self, number: int) -> dict[str, Any]:
        """Returns what an mp_rank file holds, without tensors of the model and the optimizer."""
        states = load_torch_file(
            self.source.step / RANK_FILE_NAME.format(number), self.source.step.parent
        )
        optimizer = states.get("optimizer")
        return {
            **{key: value for key, value in states.items() if key not in ("module", "optimizer")},
            "optimizer": sorted(optimizer) if isinstance(optimizer, Mapping) else None,
        }

    def _zero_stage(self, states: Mapping[str, Any]) -> int:
        config = states.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
        stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
        if states["optimizer"] is None:
            return stage if stage in (1, 2) else 1
        if "param_groups" not in states["optimizer"]:
            raise ConvertError(
                f"{self.source.step / RANK_FILE_NAME.format(0)}: found the states of DeepSpeed's "
                "optimizer of 16 bits without ZeRO, wanted with --with-optimizer those of ZeRO 1 "
                "or 2, or of float32"
            )
        return 0

    def _find_prefix(self) -> str:
        found = {m[1] or "" for p in self.source.step.iterdir() if (m := _partition(p))}
        if len(found) > 1:
            raise ConvertError(
                f"{self.source.step}: holds optimizer states with bf16_ in their names and without:"
                " the files of two runs are mixed"
            )
        for path in self.source.step.iterdir():
            if (match := _partition(path)) and not (
                int(match[2]) < self.layout.data_parallel and int(match[3]) < len(self.rank_states)
            ):
                raise ConvertError(
                    f"{path}: a file of no rank: the checkpoint is of "
                    f"{self.layout.data_parallel} data-parallel ranks of "
                    f"{len(self.rank_states)} model ranks"
                )
        return next(iter(found), "")

    def _optimizer_state(self, number: int, data_rank: int) -> tuple[Mapping[str, Any], Mapping]:
        """Returns ZeRO's states of a rank, empty without ZeRO, and PyTorch's `state_dict`."""
        file = self._file(number, data_rank)
        content = load_torch_file(file, self.source.step.parent)
        zero = content.get("optimizer_state_dict") if self.stage else {}
        base = (zero or {}).get("base_optimizer_state") if self.stage else content.get("optimizer")
        if isinstance(base, list):
            refuse("zero_optimization.elastic_checkpoint", True, "false with --with-optimizer")
        if not isinstance(base, Mapping) or not isinstance(base.get("state"), Mapping):
            raise ConvertError(f"{file}: holds no optimizer states")
        return zero, base

    def _tensors(self, number: int, data_rank: int) -> dict[str, torch.Tensor]:
        """Returns the states with a number for each weight, by "{kind} {index}"; the index is that
        of the group under ZeRO, else that of the parameter."""
        zero, base = self._optimizer_state(number, data_rank)
        found = {
            f"{kind} {index}": value
            for index, states in base["state"].items()
            for kind, value in states.items()
            if kind in MOMENTS
        }
        if self.stage:
            masters = zero.get("single_partition_of_fp32_groups") or ()
            found |= {f"{MASTER} {index}": value for index, value in enumerate(masters)}
        return plain_tensors(found, self._file(number, data_rank))

    # ---- Checks

    def _check_names(self, number: int, groups: list[Group]) -> None:
        """Compares the names and shapes that ZeRO recorded with those that are expected."""
        recorded = self.rank_states[number].get("param_shapes")
        if not self.stage or recorded is None:
            return
        names = [
            [parameter_name(r, self.source.shape, self.layout) for r in g.rules] for g in groups
        ]
        wanted = [
            list(zip(by_group, group.shapes(), strict=True))
            for by_group, group in zip(names, groups, strict=True)
        ]
        found = [[(name, tuple(size)) for name, size in group.items()] for group in recorded]
        if found != wanted:
            raise ConvertError(
                f"{self.source.step / RANK_FILE_NAME.format(number)}: the optimizer's parameters "
                "are in another order or shape than the settings give: param_shapes"
            )

    def _check_file(self, number: int, data_rank: int, groups: list[Group]) -> None:
        """Checks kinds and sizes of a file's states, and that all files agree on the rest."""
        file = self._file(number, data_rank)
        zero, base = self._optimizer_state(number, data_rank)
        if self.stage:
            sizes = [(group.partition(self.layout.data_parallel),) for group in groups]
        else:
            sizes = [shape for group in groups for shape in group.shapes()]
        if sorted(base["state"]) != list(range(len(sizes))):
            raise ConvertError(
                f"{file}: holds optimizer states of {len(base['state'])} tensors, wanted "
                f"{len(sizes)}"
            )
        kinds: set[str] = set()
        for index, states in base["state"].items():
            for kind, value in states.items():
                if kind in MOMENTS:
                    kinds.add(kind)
                    if getattr(value, "shape", None) != sizes[index]:
                        raise ConvertError(
                            f"{file}: {kind} {index} has shape "
                            f"{shown(list(getattr(value, 'shape', ())))}, wanted "
                            f"{shown(list(sizes[index]))}"
                        )
                elif kind == "step":
                    count = float(value)
                    if self.counts.setdefault(kind, value) != count:
                        raise ConvertError(
                            f"{file}: found step {count}, wanted {float(self.counts[kind])}, as in "
                            "the other states"
                        )
                else:
                    raise ConvertError(
                        f"{file}: found optimizer state {shown(kind)}, wanted those of Adam or "
                        f"Lion: step, {', '.join(MOMENTS)}"
                    )
        self._check_kinds(file, kinds | ({MASTER} if self.stage else set()))
        if self.stage:
            self._check_masters(file, data_rank, zero, groups)
        names = [group.name for group in groups]
        held = base.get("param_groups")
        if [group.get("name") for group in held or ()] != names:
            raise ConvertError(f"{file}: found other groups of parameters than {', '.join(names)}")
        for group in held:
            values = {key: value for key, value in group.items() if key != "params"}
            if self.hyperparameters.setdefault(group["name"], values) != values:
                raise ConvertError(
                    f"{file}: {group['name']} has other hyperparameters than in the other files"
                )

    def _check_kinds(self, file: Path, found: set[str]) -> None:
        kinds = tuple(kind for kind in (MASTER, *MOMENTS) if kind in found)
        self.kinds = self.kinds or kinds
        if kinds != self.kinds:
            raise ConvertError(
                f"{file}: holds {', '.join(kinds)}, wanted {', '.join(self.kinds)}, as in the "
                "other files"
            )

    def _check_masters(
        self, file: Path, data_rank: int, zero: Mapping[str, Any], groups: list[Group]
    ) -> None:
        masters = zero.get("single_partition_of_fp32_groups")
        if any(map(any, zero.get("param_alignment_paddings") or ())):
            refuse("zero_optimization.parameter_alignment", True, "false with --with-optimizer")
        for index, group in enumerate(groups):
            width = group.partition(self.layout.data_parallel)
            least = min(max(group.size - data_rank * width, 0), width)  # without padding
            found = len(masters[index]) if masters and index < len(masters) else None
            if found is None or not least <= found <= width:
                raise ConvertError(
                    f"{file}: the weights of {group.name} have {found} numbers, wanted {width}"
                )
        if not self.zero_states:
            self.zero_states = {
                key: value
                for key, value in zero.items()
                if key in ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
            }


def _partition(path: Path) -> re.Match | None:
    return PARTITION_FILE.fullmatch(path.name)
