"""Writing GPT-NeoX checkpoints of a MetaLA model, weights only, for any layout."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from convert.command import ConvertError
from convert.layout import check_tensor_parallel
from convert.tensor_table import TensorRule, check_finite, module_layers, tensor_table
from megatron_patch.architecture import Architecture
from megatron_patch.architecture_neox import with_defaults
from megatron_patch.neox.yaml_config import merge_yaml_texts


def check_layout(shape: Architecture, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raises a ConvertError if GPT-NeoX could not run the model in this layout."""
    if tensor_parallel < 1 or pipeline_parallel < 0:
        raise ConvertError("tensor parallel must be at least 1, pipeline parallel at least 0")
    check_tensor_parallel(shape, tensor_parallel)
    if pipeline_parallel > shape.num_layers:
        raise ConvertError(
            f"pipeline parallel {pipeline_parallel}: the model has only {shape.num_layers} layers"
        )


def write_checkpoint(
    folder: Path,
    shape: Architecture,
    full: Callable[[TensorRule], torch.Tensor],
    tensor_parallel: int,
    pipeline_parallel: int,
    iteration: int,
    settings: Mapping[str, Any],
    configs: Mapping[str, str],
) -> None:
    """Writes a checkpoint that GPT-NeoX loads with `finetune: true`.

    Args:
        folder: what GPT-NeoX's `load` will name; exists and is empty.
        shape: the model's, its padded vocabulary that of the new layout.
        full: gives a tensor over all ranks, by the rule of `tensor_table(shape)`.
        tensor_parallel, pipeline_parallel: the new layout; 0 is the form without a pipeline.
        iteration: number of the iteration.
        settings: merged settings of the new layout.
        configs: its YAML files by name.
    """
    step = folder / f"global_step{iteration}"
    (step / "configs").mkdir(parents=True)
    for name, text in configs.items():
        (step / "configs" / name).write_text(text, encoding="utf-8")
    table = tensor_table(shape)
    states = _states(shape, tensor_parallel, pipeline_parallel, iteration, settings)
    with tqdm(
        total=len(table) * (1 if pipeline_parallel else tensor_parallel), desc="tensors"
    ) as bar:
        if pipeline_parallel:
            _write_layers(step, shape, table, full, tensor_parallel, bar)
            for rank in range(tensor_parallel * pipeline_parallel):
                torch.save({"module": None, **states}, _rank_file(step, rank))
        else:
            for rank in range(tensor_parallel):
                # All ranks at once would need the memory of the whole model.
                module = OrderedDict()
                for rule in table:
                    shard = rule.shard(full(rule), tensor_parallel, rank)
                    module[f"sequential.{rule.layer}.{rule.name}"] = _own(shard, rule)
                    bar.update()
                torch.save({"module": module, **states}, _rank_file(step, rank))
    (folder / "latest").write_text(step.name)


def _write_layers(
    step: Path,
    shape: Architecture,
    table: Sequence[TensorRule],
    full: Callable[[TensorRule], torch.Tensor],
    tensor_parallel: int,
    bar: tqdm,
) -> None:
    """One file for each layer and rank. Layers without tensors have one too: DeepSpeed wants it."""
    for layer in module_layers(shape):
        shards: list[OrderedDict] = [OrderedDict() for _ in range(tensor_parallel)]
        for rule in (rule for rule in table if rule.layer == layer):
            tensor = full(rule)
            for rank, tensors in enumerate(shards):
                tensors[rule.name] = _own(rule.shard(tensor, tensor_parallel, rank), rule)
            bar.update()
        for rank, tensors in enumerate(shards):
            torch.save(tensors, step / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")


def _own(shard: torch.Tensor, rule: TensorRule) -> torch.Tensor:
    """A copy: `torch.save` would write the whole tensor that a view belongs to.

    Raises:
        ConvertError: a number is not finite.
    """
    check_finite(shard, f"layer {rule.layer}: {rule.name}")
    return shard.clone(memory_format=torch.contiguous_format)


def _rank_file(step: Path, rank: int) -> Path:
    return step / f"mp_rank_{rank:02d}_model_states.pt"


def _states(
    shape: Architecture,
    tensor_parallel: int,
    pipeline_parallel: int,
    iteration: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What DeepSpeed's `load_checkpoint` and GPT-NeoX's checks read beside the tensors."""
    args = with_defaults(settings)
    return {
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": iteration,
        "dp_world_size": 1,
        # DeepSpeed counts the files of all ranks but those of data parallelism.
        "mp_world_size": tensor_parallel * max(pipeline_parallel, 1),
        "iteration": iteration,
        "args": {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_heads,
            "make_vocab_size_divisible_by": args.make_vocab_size_divisible_by,
            "padded_vocab_size": shape.padded_vocab_size,
            "model_parallel_size": tensor_parallel,
        },
    }


def adapt_configs(
    configs: Mapping[str, str],
    tensor_parallel: int,
    pipeline_parallel: int,
    others: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The YAML files of a run, changed to another layout; comments and the rest stay.

    A key that no file has is added to the first one. Where a file is written too unusually to be
    changed in place, it is written anew, without its comments.

    Args:
        configs: the files' texts by name.
        tensor_parallel, pipeline_parallel: the new layout.
        others: further settings to change; a number, or a mapping whose `stage` is another.
    """
    changed = dict(configs)
    wanted = {
        "model_parallel_size": tensor_parallel,
        "pipe_parallel_size": pipeline_parallel,
        **(others or {}),
    }
    for key, value in wanted.items():
        for name in changed:
            settings = merge_yaml_texts({name: changed[name]})
            if key in settings:
                break
        else:
            name = next(iter(changed))
            settings = merge_yaml_texts({name: changed[name]})
        settings[key] = value
        word, number = ("stage", value["stage"]) if isinstance(value, Mapping) else (key, value)
        word = word.replace("_", "[-_]")
        pattern = rf"(?m)^([^#\n]*?(?<![\w-])[\"']?{word}[\"']?\s*:\s*)\d+"
        text = re.sub(pattern, rf"\g<1>{number}", changed[name])
        if merge_yaml_texts({name: text}) != settings:
            text = yaml.safe_dump(settings, sort_keys=False)
        changed[name] = text
    return changed
