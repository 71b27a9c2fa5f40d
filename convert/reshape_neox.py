#!/usr/bin/env python3
"""Writes a GPT-NeoX checkpoint of a MetaLA model in another parallel layout.

python convert/reshape_neox.py --checkpoint CHECKPOINTS --output FOLDER --tensor-parallel 2 \\
    --pipeline-parallel 1

The weights alone, from which a run starts anew; with `--with-optimizer` also the optimizer's
states, the schedule and the random states, with which the run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from convert.command import ConvertError, command_parser
from convert.export_record import check_checkpoint_export, write_record
from convert.neox_reader import NeoXCheckpoint, config_texts
from convert.neox_writer import (
    adapt_configs,
    check_layout,
    divisor_that_keeps,
    padded_vocabulary,
    tell_new_rows,
    write_checkpoint,
)
from convert.optimizer_layout import Layout
from convert.optimizer_reader import OptimizerReader
from convert.optimizer_writer import OptimizerWriter, batch
from convert.output_folder import check_target, complete_folder
from convert.tokenizer import find_tokenizer, read_tokenizer
from megatron_patch.architecture import WHOLE
from megatron_patch.architecture_neox import with_defaults
from megatron_patch.commands.command_line import run_script, whole
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
    with_optimizer: bool = False,
    data_parallel: int | None = None,
) -> NeoXCheckpoint:
    """Writes `output`, a folder for GPT-NeoX's `load`, and returns it opened. If anything fails, it
    is as it was before. For arguments and errors not described here, see `neox_to_hf`.

    The vocabulary keeps its rows: `make_vocab_size_divisible_by` changes if GPT-NeoX would pad to
    other rows in the new layout. If the ranks cannot have equal parts of the rows, the fewest
    possible rows of zeros are added. Notes on stderr say which settings changed and how many rows
    are new.

    Args:
        tensor_parallel, pipeline_parallel: the new layout; 0 stages write mp_rank files.
        tokenizer: read only if `tensor_parallel` changes.
        with_optimizer: writes the optimizer's states too, so that the run goes on.
        data_parallel: the number of data-parallel ranks that go on, by default as many as before.
    """
    if data_parallel is not None and not (with_optimizer and WHOLE.accepts(data_parallel)):
        wanted = "at least 1" if with_optimizer else "none without --with-optimizer"
        raise ConvertError(f"--data-parallel: found {data_parallel}, wanted {wanted}")
    check_target(output, overwrite, check_checkpoint_export)
    source = NeoXCheckpoint(checkpoint, iteration, config)
    reader = OptimizerReader(source) if with_optimizer else None
    others = zero_that_loads(source.settings, tensor_parallel, pipeline_parallel)
    rows = source.shape.padded_vocab_size
    if tensor_parallel != source.tensor_parallel and tensor_parallel >= 1:
        rows, divisor = vocabulary_that_fits(source, tokenizer, tensor_parallel)
        others |= divisor
    shape = replace(source.shape, padded_vocab_size=rows)
    check_layout(shape, tensor_parallel, pipeline_parallel)
    if reader is not None:
        ranks = data_parallel or reader.layout.data_parallel
        layout = Layout(tensor_parallel, pipeline_parallel, ranks)
        if ranks != reader.layout.data_parallel:
            others |= batch_that_stays(source, reader, ranks)
    given = read_yaml(config) if config else config_texts(source.step)
    texts = in_one_folder(settle(given))
    configs = adapt_configs(texts, tensor_parallel, pipeline_parallel, others)
    settings = merge_yaml_texts(configs)
    writer = None
    if reader is not None:
        changed = "zero_optimization" in others
        writer = OptimizerWriter(reader, shape, layout, settings, 1 if changed else reader.stage)
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
            writer,
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
    written = NeoXCheckpoint(output)
    print(
        f"wrote {written.step}: tensor parallel {tensor_parallel}, pipeline parallel "
        f"{pipeline_parallel}, {rows:,} vocabulary rows"
    )
    if reader is None:
        print(f"train from it with load: {output} and finetune: true")
    else:
        ranks = layout.stages * tensor_parallel * layout.data_parallel
        print(f"go on from it with load: {output} on {ranks} ranks")
    return written


def vocabulary_that_fits(
    source: NeoXCheckpoint, tokenizer: Path | None, tensor_parallel: int
) -> tuple[int, dict[str, int]]:
    """Returns the vocabulary's rows for another number of tensor-parallel ranks, and
    `make_vocab_size_divisible_by` by its name if it has to change. Raises a ConvertError if the
    tokenizer is not the training's."""
    args, rows = with_defaults(source.settings), source.shape.padded_vocab_size
    words = read_tokenizer(find_tokenizer(tokenizer, args))
    before = args.make_vocab_size_divisible_by
    if padded_vocabulary(words.size, before, source.tensor_parallel) != rows:
        raise ConvertError(
            f"{words.source} has {words.size} tokens, which do not give the checkpoint's {rows} "
            "rows: not the tokenizer of this training? Give the right one by --tokenizer"
        )
    kept = divisor_that_keeps(rows, words.size, tensor_parallel, before)
    changed = {} if kept == before else {"make_vocab_size_divisible_by": kept}
    return padded_vocabulary(words.size, kept, tensor_parallel), changed


def batch_that_stays(
    source: NeoXCheckpoint, reader: OptimizerReader, data_parallel: int
) -> dict[str, int]:
    """Returns the batch settings that change with the number of data-parallel ranks. Raises a
    ConvertError if the number cannot change."""
    if ((source.settings.get("metala") or {}).get("context_parallel_size") or 1) > 1:
        raise ConvertError(
            "--data-parallel: found another number than before, wanted the same with "
            "metala.context_parallel_size above 1, whose ranks count as data-parallel"
        )
    settings = batch(reader.rank_states[0]["ds_config"], data_parallel)
    return {key: value for key, value in settings.items() if source.settings.get(key) != value}


def zero_that_loads(
    settings: Mapping[str, Any], tensor_parallel: int, pipeline_parallel: int
) -> dict[str, Any]:
    """Returns `zero_optimization` with stage 1 if the run's stage cannot load the new layout, else
    an empty dict. Stage 3 reads only its own files, and GPT-NeoX has neither stage 2 nor 3 with
    tensor or pipeline parallelism."""
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    is_split = tensor_parallel > 1 or pipeline_parallel > 0
    if stage == 3 or (stage == 2 and is_split):
        return {"zero_optimization": {**zero, "stage": 1}}
    return {}


def in_one_folder(texts: dict[str, str]) -> dict[str, str]:
    """Returns the texts by file name without folder, as a checkpoint holds them."""
    by_name: dict[str, str] = {}
    for path, text in texts.items():
        if (name := Path(path).name) in by_name:
            raise ConvertError(
                f"--config: found two files named {name}, wanted different names: a checkpoint "
                "holds them in one folder"
            )
        by_name[name] = text
    return by_name


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__, "checkpoint", reads_checkpoint=True, takes_layout=True)
    states = "write the optimizer's states too, so that the run goes on"
    parser.add_argument("--with-optimizer", action="store_true", help=states)
    ranks = "with --with-optimizer: data-parallel ranks that go on; default: as many as before"
    parser.add_argument("--data-parallel", type=whole(1), metavar="D", help=ranks)
    reshape_neox(**vars(parser.parse_args(argv)))


cli = partial(run_script, main)


if __name__ == "__main__":
    cli()
