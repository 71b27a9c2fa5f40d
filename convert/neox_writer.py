"""Writing GPT-NeoX checkpoints and their settings, for any parallel layout. `optimizer_writer.py`
writes the optimizer's states."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from convert.command import ConvertError
from convert.neox_reader import LAYER_FILE_NAME, RANK_FILE_NAME, check_tensor_parallel
from convert.optimizer_writer import OptimizerWriter
from convert.tensor_table import TensorRule, check_finite, tensor_table
from megatron_patch.architecture import Architecture
from megatron_patch.architecture_neox import module_layers, with_defaults
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
    optimizer: OptimizerWriter | None = None,
) -> None:
    """Writes a checkpoint that GPT-NeoX loads, without an optimizer only with `finetune: true`.

    Args:
        folder: an empty folder, for GPT-NeoX's `load`.
        shape: the model's shape, with the padded vocabulary of the new layout.
        full: returns a tensor over all ranks for a rule of `tensor_table(shape)`.
        tensor_parallel, pipeline_parallel: the new layout; 0 stages write mp_rank files.
        iteration: the iteration's number.
        settings, configs: the new layout's settings, merged, and as YAML texts by file name.
        optimizer: writes its states in the same layout.
    """
    step = folder / f"global_step{iteration}"
    (step / "configs").mkdir(parents=True)
    for name, text in configs.items():
        (step / "configs" / name).write_text(text, encoding="utf-8")
    table = tensor_table(shape)
    weights_only = _states(shape, tensor_parallel, pipeline_parallel, iteration, settings)

    def states(number: int) -> dict[str, Any]:
        if optimizer is None:
            return weights_only
        return optimizer.rank_states(number, weights_only["args"])

    with tqdm(
        total=len(table) * (1 if pipeline_parallel else tensor_parallel), desc="tensors"
    ) as bar:
        if pipeline_parallel:
            _write_layers(step, shape, table, full, tensor_parallel, bar)
            for rank in range(tensor_parallel * pipeline_parallel):
                torch.save({"module": None, **states(rank)}, step / RANK_FILE_NAME.format(rank))
        else:
            # Rank by rank: all ranks at once would take the memory of the whole model.
            for rank in range(tensor_parallel):
                module = OrderedDict()
                for rule in table:
                    shard = rule.shard(full(rule), tensor_parallel, rank)
                    module[f"sequential.{rule.layer}.{rule.name}"] = _copy(shard, rule)
                    bar.update()
                torch.save({"module": module, **states(rank)}, step / RANK_FILE_NAME.format(rank))
    if optimizer is not None:
        optimizer.write_partitions(step)
    (folder / "latest").write_text(step.name)


def _write_layers(
    step: Path,
    shape: Architecture,
    table: Sequence[TensorRule],
    full: Callable[[TensorRule], torch.Tensor],
    tensor_parallel: int,
    bar: tqdm,
) -> None:
    """Writes a file for each layer and rank. DeepSpeed wants one for layers without tensors too."""
    for layer in module_layers(shape.num_layers, shape.tied):
        shards: list[OrderedDict] = [OrderedDict() for _ in range(tensor_parallel)]
        for rule in (rule for rule in table if rule.layer == layer):
            tensor = full(rule)
            for rank, tensors in enumerate(shards):
                tensors[rule.name] = _copy(rule.shard(tensor, tensor_parallel, rank), rule)
            bar.update()
        for rank, tensors in enumerate(shards):
            torch.save(tensors, step / LAYER_FILE_NAME.format(layer, rank))


def _copy(shard: torch.Tensor, rule: TensorRule) -> torch.Tensor:
    """Returns a copy, since `torch.save` would write the whole tensor that a view belongs to.
    Raises a ConvertError if a number is not finite."""
    check_finite(shard, f"layer {rule.layer}: {rule.name}")
    return shard.clone(memory_format=torch.contiguous_format)


def _states(
    shape: Architecture,
    tensor_parallel: int,
    pipeline_parallel: int,
    iteration: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what DeepSpeed's `load_checkpoint` and GPT-NeoX's checks read besides tensors."""
    args = with_defaults(settings)
    return {
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": iteration,
        "dp_world_size": 1,
        # DeepSpeed counts all ranks but those of data parallelism.
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
    """Returns a run's YAML texts with the settings of another layout; comments stay. `others` are
    further settings to change: numbers, or a mapping with another `stage`.

    A key that no file has is added to the first file. A file in which a value cannot be replaced in
    place is dumped again, without its comments.
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


# GPT-NeoX pads the vocabulary to a multiple of `make_vocab_size_divisible_by` times the number of
# tensor-parallel ranks, so that a new layout may change its rows.


def padded_vocabulary(tokens: int, divisible_by: int, tensor_parallel: int) -> int:
    """Returns the rows that GPT-NeoX gives the embedding for a tokenizer of `tokens` tokens."""
    multiple = divisible_by * tensor_parallel
    return -(-tokens // multiple) * multiple


def divisor_that_keeps(rows: int, tokens: int, tensor_parallel: int, preferred: int = 128) -> int:
    """Returns the `make_vocab_size_divisible_by` that keeps all rows and adds the fewest,
    `preferred` among equally good ones.

    The number of rows is part of the model: the head has no bias, so that a new row of zeros has
    the logit 0, which counts in the loss; and the padding rows that are there were trained.
    """
    powers = [128, 64, 32, 16, 8, 4, 2, 1]
    candidates = [preferred, *powers, -(-rows // tensor_parallel)]

    def padded(divisible_by: int) -> int:
        return padded_vocabulary(tokens, divisible_by, tensor_parallel)

    return min((n for n in candidates if padded(n) >= rows), key=padded)


def tell_new_rows(added: int) -> None:
    """Prints a note if rows had to be added to the vocabulary."""
    if added:
        print(
            f"note: {added} new vocabulary rows of zeros, since the ranks must have equal shares: "
            "their logits are 0 and count in the loss",
            file=sys.stderr,
        )
