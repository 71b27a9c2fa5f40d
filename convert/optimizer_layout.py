"""Where DeepSpeed keeps the optimizer's states of each tensor, in any parallel layout.

GPT-NeoX gives DeepSpeed two groups of parameters, those that decay and those that do not, each in
the order of `torch.nn.Module.modules()`. A model rank (one tensor-parallel rank of one pipeline
stage) flattens each group into one tensor. ZeRO 1 and 2 pad that tensor to a multiple of twice the
number of data-parallel ranks, and give each rank an equal partition of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.command import ConvertError
from convert.tensor_table import TensorRule
from megatron_patch.architecture import METALA, Architecture, refuse
from megatron_patch.architecture_neox import with_defaults

DECAY, NO_DECAY = "weight_decay_params", "no_weight_decay_params"  # GPT-NeoX's names
# DeepSpeed's `nccl_start_alignment_factor`.
ALIGNMENT = 2
# GPT-NeoX's default `pipe_partition_method`, and what the plugin makes of it.
_BY_LAYER = ("type:transformer|mlp", f"type:transformer|mlp|{METALA}")


@dataclass(frozen=True)
class Layout:
    """Numbers of ranks. `pipeline_parallel` is 0 for a model without a pipeline."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int

    @property
    def stages(self) -> int:
        return max(self.pipeline_parallel, 1)

    def model_ranks(self) -> Iterator[tuple[int, int, int]]:
        """Yields (number in file names, stage, tensor-parallel rank) of each model rank."""
        for stage in range(self.stages):
            for rank in range(self.tensor_parallel):
                yield stage * self.tensor_parallel + rank, stage, rank


@dataclass(frozen=True)
class Group:
    """One of DeepSpeed's groups of parameters on a model rank.

    Attributes:
        name: GPT-NeoX's name of the group.
        rules: its tensors, in their order.
        tensor_parallel: the number of ranks that split each tensor.
    """

    name: str
    rules: tuple[TensorRule, ...]
    tensor_parallel: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Returns the shape of each tensor on one rank."""
        return [rule.shard_shape(self.tensor_parallel) for rule in self.rules]

    def named_shapes(self) -> list[tuple[TensorRule, tuple[int, ...]]]:
        return list(zip(self.rules, self.shapes(), strict=True))

    def places(self) -> Iterator[tuple[TensorRule, int, int]]:
        """Yields (tensor, start, size) inside the flat group."""
        start = 0
        for rule, shape in self.named_shapes():
            yield rule, start, math.prod(shape)
            start += math.prod(shape)

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes()))

    def partition(self, data_parallel: int) -> int:
        """Returns the size of a data-parallel rank's partition under ZeRO, with padding."""
        return -(-self.size // (ALIGNMENT * data_parallel)) * ALIGNMENT


def groups_by_stage(
    shape: Architecture, table: Sequence[TensorRule], settings: Mapping[str, Any], layout: Layout
) -> list[list[Group]]:
    """Returns the groups of each pipeline stage. Groups without parameters are left out, as
    DeepSpeed does. Raises a SettingsError if the settings split the pipeline in another way than
    by its transformer layers."""
    one_group = settings.get("weight_decay", 0.1) == 0  # GPT-NeoX then makes one group alone
    stages = []
    for rules in _rules_by_stage(shape, table, settings, layout):
        by_name: dict[str, list[TensorRule]] = {DECAY: [], NO_DECAY: []}
        for rule in rules:
            by_name[NO_DECAY if one_group or not _decays(rule) else DECAY].append(rule)
        stages.append(
            [Group(name, tuple(r), layout.tensor_parallel) for name, r in by_name.items() if r]
        )
    return stages


def parameter_name(rule: TensorRule, shape: Architecture, layout: Layout) -> str:
    """Returns DeepSpeed's name of a parameter."""
    if not layout.pipeline_parallel:
        return f"sequential.{rule.layer}.{rule.name}"
    if shape.tied and rule.layer == 0:
        return f"tied_modules.embed.{rule.name}"
    return f"{rule.layer}.{rule.name}"


def _decays(rule: TensorRule) -> bool:
    """Returns whether GPT-NeoX decays a tensor: no bias, no weight of a norm, and none of the two
    parameters by heads, which the layer marks `_no_weight_decay`."""
    *modules, name = rule.name.split(".")
    is_of_norm = modules and "norm" in modules[-1]
    return not (is_of_norm or name in ("bias", "scale", "out_gate_bias", "aug_balance"))


def _rules_by_stage(
    shape: Architecture, table: Sequence[TensorRule], settings: Mapping[str, Any], layout: Layout
) -> list[list[TensorRule]]:
    n = shape.num_layers
    by_layer: dict[int, list[TensorRule]] = {}
    for rule in table:
        by_layer.setdefault(rule.layer, []).append(rule)
    layers = [_in_module_order(by_layer.get(layer, [])) for layer in range(n + 5)]
    if layout.stages == 1:
        return [sum(layers, [])]
    method = with_defaults(settings).pipe_partition_method.lower()
    if method not in _BY_LAYER:
        refuse(
            "pipe_partition_method",
            method,
            f"{_BY_LAYER[0]}, to write an optimizer's states for a pipeline",
        )
    try:
        # Releases of DeepSpeed differ in this function: the one that trains has to be asked.
        from deepspeed.runtime.utils import partition_balanced
    except ImportError:
        raise ConvertError(
            "DeepSpeed is not installed, which tells the layers of each pipeline stage"
        ) from None
    weights = [int(2 <= layer < n + 2) for layer in range(n + 5)]
    bounds = [int(bound) for bound in partition_balanced(weights, layout.stages)]
    stages = [sum(layers[a:b], []) for a, b in zip(bounds, bounds[1:], strict=False)]
    if shape.tied and bounds[-2] > 0:
        stages[-1] = layers[0] + stages[-1]  # the head is a second copy of the embedding
    return stages


def _in_module_order(rules: Sequence[TensorRule], depth: int = 0) -> list[TensorRule]:
    """Returns a layer's tensors as `Module.modules()` meets them: a module's own come before those
    of the modules in it."""
    own = [rule for rule in rules if rule.name.count(".") == depth]
    inner: dict[str, list[TensorRule]] = {}
    for rule in rules:
        if rule.name.count(".") > depth:
            inner.setdefault(rule.name.split(".")[depth], []).append(rule)
    return own + [rule for part in inner.values() for rule in _in_module_order(part, depth + 1)]
