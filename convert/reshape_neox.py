#!/usr/bin/env python3
"""A GPT-NeoX checkpoint of a MetaLA model in another layout of tensor- and pipeline-parallel ranks,
weights only:

python convert/reshape_neox.py --checkpoint CHECKPOINTS --output FOLDER --tensor-parallel 2 \\
    --pipeline-parallel 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.command import ConvertError, run
from convert.export_record import check_checkpoint_export, write_record
from convert.folder import check_target, complete_folder
from convert.neox_checkpoint import NeoXCheckpoint, config_texts
from convert.neox_writer import adapt_configs, check_layout, write_checkpoint
from convert.tokenizer_folder import find_tokenizer, read_tokenizer
from convert.vocabulary import divisor_that_keeps, padded_vocabulary, tell_new_rows
from megatron_patch.architecture_neox import with_defaults
from megatron_patch.neox.yaml_config import merge_yaml_texts, read_yaml, settle


def reshape_neox(
    checkpoint: Path,
    output: Path,
    tensor_parallel: int,
    pipeline_parallel: int,
    iteration: int | None = None,
    config: list[Path] | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> NeoXCheckpoint:
    """Writes `output`, a folder for GPT-NeoX's `load`, complete or not at all.

    The vocabulary keeps its rows: `make_vocab_size_divisible_by` is changed where GPT-NeoX would
    pad otherwise in the new layout. Where the ranks cannot have equal shares of them, rows of zeros
    are added, as few as possible. What is changed in the settings, and new rows, are told.

    Args:
        checkpoint: the folder that GPT-NeoX's `save` named.
        output: the folder to write.
        tensor_parallel, pipeline_parallel: the new layout; 0 is the form without a pipeline.
        iteration: which one to read, by default the latest.
        config: YAML files of the run, in place of those inside the checkpoint.
        tokenizer: tokenizer.json or a tokenizer's folder, in place of the settings' `vocab_file`;
            read only where the padding could change.
        overwrite: whether to replace a checkpoint folder that is there.

    Returns:
        the checkpoint written, opened.

    Raises:
        ConvertError: something is missing, damaged or impossible; see the line.
        SettingsError: the settings are malformed.
    """
    check_target(output, overwrite, check_checkpoint_export)
    source = NeoXCheckpoint(checkpoint, iteration, config)
    args = with_defaults(source.settings)
    rows = source.shape.padded_vocab_size
    others = zero_that_loads(source.settings, tensor_parallel, pipeline_parallel)
    if tensor_parallel != source.tensor_parallel and tensor_parallel >= 1:
        words = read_tokenizer(find_tokenizer(tokenizer, args))
        divisible_by = args.make_vocab_size_divisible_by
        if padded_vocabulary(words.size, divisible_by, source.tensor_parallel) != rows:
            raise ConvertError(
                f"{words.source} has {words.size} tokens, which do not give the checkpoint's "
                f"{rows} rows: not the tokenizer of this training? Give the right one by "
                "--tokenizer"
            )
        kept = divisor_that_keeps(rows, words.size, tensor_parallel, divisible_by)
        rows = padded_vocabulary(words.size, kept, tensor_parallel)
        if kept != divisible_by:
            others["make_vocab_size_divisible_by"] = kept
    shape = replace(source.shape, padded_vocab_size=rows)
    check_layout(shape, tensor_parallel, pipeline_parallel)
    given = read_yaml(config) if config else config_texts(source.step)
    texts = in_one_folder(settle(given))
    configs = adapt_configs(texts, tensor_parallel, pipeline_parallel, others)
    settings = merge_yaml_texts(configs)
    with complete_folder(output, overwrite, check_checkpoint_export) as folder:
        write_checkpoint(
            folder,
            shape,
            source.full,
            tensor_parallel,
            pipeline_parallel,
            source.iteration,
            settings,
            configs,
        )
        write_record(folder)
    for key, value in others.items():
        told = f"stage {value['stage']}" if isinstance(value, Mapping) else value
        print(
            f"note: the settings written have {key}: {told}; a training from other YAML files "
            "needs it too",
            file=sys.stderr,
        )
    tell_new_rows(rows - source.shape.padded_vocab_size)
    return NeoXCheckpoint(output)


def zero_that_loads(
    settings: Mapping[str, Any], tensor_parallel: int, pipeline_parallel: int
) -> dict[str, Any]:
    """`zero_optimization` with stage 1, where the run's stage cannot load the new layout: stage 3
    reads files of its own, and GPT-NeoX has 2 and 3 on one rank without a pipeline alone."""
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    is_split = tensor_parallel > 1 or pipeline_parallel > 0
    if stage == 3 or (stage == 2 and is_split):
        return {"zero_optimization": {**zero, "stage": 1}}
    return {}


def in_one_folder(texts: dict[str, str]) -> dict[str, str]:
    """Texts by the names that their files have inside a checkpoint, in one folder."""
    by_name: dict[str, str] = {}
    for path, text in texts.items():
        if (name := Path(path).name) in by_name:
            raise ConvertError(
                f"--config: found two files named {name}, wanted different names: a checkpoint "
                "holds them in one folder"
            )
        by_name[name] = text
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a GPT-NeoX checkpoint in another parallel layout (weights only)."
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the folder that GPT-NeoX's `save` named"
    )
    parser.add_argument("--iteration", type=int, help="default: the latest")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tensor-parallel", type=int, required=True, metavar="N")
    parser.add_argument(
        "--pipeline-parallel",
        type=int,
        required=True,
        metavar="M",
        help="0 for the form without a pipeline",
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="YML",
        help="the run's settings, in place of those inside the checkpoint",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json or a tokenizer's folder, in place of the settings' vocab_file",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint folder that is there"
    )
    options = parser.parse_args()
    written = reshape_neox(
        options.checkpoint,
        options.output,
        options.tensor_parallel,
        options.pipeline_parallel,
        options.iteration,
        options.config,
        options.tokenizer,
        options.overwrite,
    )
    print(
        f"wrote {written.step}: tensor parallel {options.tensor_parallel}, pipeline parallel "
        f"{options.pipeline_parallel}, {written.shape.padded_vocab_size:,} vocabulary rows\n"
        f"train from it with load: {options.output} and finetune: true"
    )


if __name__ == "__main__":
    run(main)
