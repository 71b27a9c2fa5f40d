#!/usr/bin/env python3
"""Imports a Hugging Face folder of a MetaLA model, the authors' or ours, into GPT-NeoX.

Writes a checkpoint of any parallel layout, and the YAML files to go on training it:

python convert/hf_to_neox.py --model FOLDER --output CHECKPOINT --tensor-parallel 2 \\
    --pipeline-parallel 0
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from convert.command import ConvertError, command_parser
from convert.export_record import check_checkpoint_export, write_record
from convert.files import check_regular, read_json, read_text
from convert.hf_io import HFFolder
from convert.neox_reader import NeoXCheckpoint
from convert.neox_writer import (
    check_layout,
    divisor_that_keeps,
    padded_vocabulary,
    tell_new_rows,
    write_checkpoint,
)
from convert.output_folder import check_target, complete_folder
from convert.tokenizer import RunTokenizer, load_tokenizer, read_tokenizer
from megatron_patch.architecture_neox import to_neox
from megatron_patch.commands.command_line import run_script

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bfloat16", torch.float16: "fp16"}
MODEL_FILE, TRAINING_FILE = "model.yml", "training.yml"
MODEL_HEAD = """\
# The model, its layout and its weights, written by convert/hf_to_neox.py. `load` and `vocab_file`
# name the folder that this file lies in: change them where it is moved.
"""
TRAINING_HEAD = """\
# How to go on training: change these as you wish. `data_path` and `save` are yours to name in
# another file.
"""


def hf_to_neox(
    model: Path,
    output: Path,
    tensor_parallel: int,
    pipeline_parallel: int,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> NeoXCheckpoint:
    """Writes `output`, a folder for GPT-NeoX's `load`, and returns it opened. If anything fails, it
    is as it was before.

    The folder holds the checkpoint, as iteration 0, `tokenizer.json`, and `configs` with the YAML.

    Args:
        model: the Hugging Face folder.
        output: the folder to write.
        tensor_parallel, pipeline_parallel: the layout; 0 stages write mp_rank files.
        tokenizer: tokenizer.json or a tokenizer's folder, in place of the model's own.
        overwrite: whether to replace a checkpoint folder that is there.

    Raises:
        ConvertError: something is missing, damaged or impossible; the line says what.
    """
    check_target(output, overwrite, check_checkpoint_export)
    source = HFFolder(model)
    rows, divisible_by = source.shape.padded_vocab_size, 1
    if tensor_parallel >= 1:  # `check_layout` refuses others
        words = read_tokenizer(tokenizer or _tokenizer_of(model))
        if words.size > rows:
            raise ConvertError(
                f"{words.source} has {words.size} tokens, but the model has {rows} rows: not its "
                "tokenizer? Give the right one by --tokenizer"
            )
        divisible_by = divisor_that_keeps(rows, words.size, tensor_parallel)
        rows = padded_vocabulary(words.size, divisible_by, tensor_parallel)
    shape = replace(source.shape, padded_vocab_size=rows)
    check_layout(shape, tensor_parallel, pipeline_parallel)
    target = output.resolve()
    settings = {
        **to_neox(source.shape),
        "make_vocab_size_divisible_by": divisible_by,
        "model_parallel_size": tensor_parallel,
        "pipe_parallel_size": pipeline_parallel,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(target / "tokenizer.json"),
        "load": str(target),
        "finetune": True,
    }
    configs = {
        MODEL_FILE: MODEL_HEAD + yaml.safe_dump(settings, sort_keys=False),
        TRAINING_FILE: TRAINING_HEAD + yaml.safe_dump(training_settings(source), sort_keys=False),
    }
    with complete_folder(output, overwrite, check_checkpoint_export) as folder:
        _write_tokenizer(words, folder / "tokenizer.json")
        write_checkpoint(
            folder, shape, source.full, tensor_parallel, pipeline_parallel, 0, settings, configs
        )
        shutil.copytree(folder / "global_step0/configs", folder / "configs")
        write_record(folder)
    padding = rows - source.shape.padded_vocab_size
    tell_new_rows(padding)
    _tell_what_is_not_kept(source, target / "tokenizer.json")
    written = NeoXCheckpoint(output)
    print(
        f"wrote {written.step}: tensor parallel {tensor_parallel}, pipeline parallel "
        f"{pipeline_parallel}, {rows:,} vocabulary rows, {padding} of them padding\n"
        f"train from it: python ./deepy.py train.py -d {target / 'configs'} "
        f"{MODEL_FILE} {TRAINING_FILE} YOURS.yml, which names data_path and save"
    )
    return written


def training_settings(source: HFFolder) -> dict[str, Any]:
    """Returns settings to go on training with, in the precision of most of the weights."""
    dtype = Counter(source.dtypes.values()).most_common(1)[0][0]
    return {
        "seq_length": 2048,
        "max_position_embeddings": 2048,
        "train_micro_batch_size_per_gpu": 8,
        "train_iters": 1000,
        "optimizer": {"type": "Adam", "params": {"lr": 3.0e-5, "betas": [0.9, 0.95], "eps": 1e-8}},
        "min_lr": 3.0e-6,
        "lr_decay_style": "cosine",
        "warmup": 0.01,
        "weight_decay": 0.1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "precision": PRECISION.get(dtype, "fp32"),
        "split": "969,30,1",
        "checkpoint_factor": 500,
        "eval_interval": 500,
        "eval_iters": 10,
        "log_interval": 10,
        "steps_per_print": 10,
    }


def _tokenizer_of(model: Path) -> Path:
    """Returns the model's tokenizer.json if it has one, else its folder."""
    path = model / "tokenizer.json"
    return check_regular(path, model) if os.path.lexists(path) else model


def _write_tokenizer(tokenizer: RunTokenizer, path: Path) -> None:
    """Writes the tokenizer as a tokenizer.json, the only format of GPT-NeoX's HFTokenizer."""
    source = tokenizer.source
    file = source / "tokenizer.json" if source.is_dir() else source
    if file.is_file():
        path.write_bytes(read_text(file).encode())
        return
    loaded = load_tokenizer(source)
    if not loaded.is_fast:
        raise ConvertError(
            f"{source}: its tokenizer has no form as tokenizer.json, which GPT-NeoX reads; give "
            "one by --tokenizer"
        )
    loaded.backend_tokenizer.save(str(path))


def _tell_what_is_not_kept(source: HFFolder, written: Path) -> None:
    """Prints a note if the model has what a tokenizer.json cannot hold, and what an export of the
    checkpoint would otherwise leave out or guess."""
    lost = []
    end, guessed = source.config.eos_token_id, read_tokenizer(written).special["eos_token_id"]
    if end not in (None, guessed, [guessed]):
        lost.append(f"eos_token_id {end}")
    config = source.folder / "tokenizer_config.json"
    values = read_json(config, source.folder) if config.is_file() else {}
    if "chat_template" in values or (source.folder / "chat_template.jinja").is_file():
        lost.append("chat template")
    if lost:
        print(
            f"note: the checkpoint does not keep {' and '.join(lost)}: export what you train from "
            f"it with --tokenizer {source.folder}",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__, "checkpoint", takes_layout=True)
    parser.add_argument("--model", type=Path, required=True, help="the Hugging Face folder")
    hf_to_neox(**vars(parser.parse_args(argv)))


cli = partial(run_script, main)


if __name__ == "__main__":
    cli()
