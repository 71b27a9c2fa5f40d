#!/usr/bin/env python3
"""A Hugging Face folder of a MetaLA model, the authors' or ours, as a GPT-NeoX checkpoint of any
parallel layout, with the YAML to go on training it:

python convert/hf_to_neox.py --model FOLDER --output CHECKPOINT --tensor-parallel 2 \\
    --pipeline-parallel 0
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from convert.command import ConvertError, run
from convert.export_record import check_checkpoint_export, write_record
from convert.folder import check_target, complete_folder
from convert.hf_reader import HFFolder
from convert.inputs import check_regular, read_text
from convert.neox_checkpoint import NeoXCheckpoint
from convert.neox_writer import check_layout, write_checkpoint
from convert.tokenizer_folder import RunTokenizer, load_tokenizer, read_tokenizer
from convert.vocabulary import divisor_that_keeps, padded_vocabulary, tell_new_rows
from megatron_patch.architecture_neox import to_neox

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
    """Writes `output`, a folder for GPT-NeoX's `load`, complete or not at all.

    It holds the checkpoint, as iteration 0, `tokenizer.json`, and `configs` with the YAML.

    Args:
        model: the Hugging Face folder.
        output: the folder to write.
        tensor_parallel, pipeline_parallel: the layout; 0 is the form without a pipeline.
        tokenizer: tokenizer.json or a tokenizer's folder, in place of the model's own.
        overwrite: whether to replace a checkpoint folder that is there.

    Returns:
        the checkpoint written, opened.

    Raises:
        ConvertError: something is missing, damaged or impossible; see the line.
    """
    check_target(output, overwrite, check_checkpoint_export)
    source = HFFolder(model)
    if tensor_parallel >= 1:
        words = read_tokenizer(tokenizer or _tokenizer_of(model))
        divisible_by = vocabulary_divisor(source, words, tensor_parallel)
        rows = padded_vocabulary(words.size, divisible_by, tensor_parallel)
    else:
        rows, divisible_by = source.shape.padded_vocab_size, 1  # refused below
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
    tell_new_rows(rows - source.shape.padded_vocab_size)
    return NeoXCheckpoint(output)


def vocabulary_divisor(source: HFFolder, tokenizer: RunTokenizer, tensor_parallel: int) -> int:
    """`make_vocab_size_divisible_by`, see `divisor_that_keeps`.

    Raises:
        ConvertError: the tokenizer has tokens for which the model has no rows.
    """
    rows = source.shape.padded_vocab_size
    if tokenizer.size > rows:
        raise ConvertError(
            f"{tokenizer.source} has {tokenizer.size} tokens, but the model has {rows} rows: not "
            "its tokenizer? Give the right one by --tokenizer"
        )
    return divisor_that_keeps(rows, tokenizer.size, tensor_parallel)


def training_settings(source: HFFolder) -> dict[str, Any]:
    """Settings with which training goes on, in the precision of most of the weights."""
    dtype = Counter(source.dtypes.values()).most_common(1)[0][0]
    return {
        "seq_length": 2048,
        "max_position_embeddings": 2048,
        "train_micro_batch_size_per_gpu": 8,
        "train_iters": 1000,
        "optimizer": {"type": "Adam", "params": {"lr": 3.0e-5, "betas": [0.9, 0.95], "eps": 1e-8}},
        "min_lr": 3.0e-6,
        "lr_decay_style": "cosine",
        "lr_decay_iters": 1000,
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
    """Its tokenizer.json, which GPT-NeoX reads, else what transformers can make one of."""
    path = model / "tokenizer.json"
    return check_regular(path, model) if os.path.lexists(path) else model


def _write_tokenizer(tokenizer: RunTokenizer, path: Path) -> None:
    """The tokenizer as a tokenizer.json, the one form that GPT-NeoX's HFTokenizer reads."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a Hugging Face folder of a MetaLA model as a GPT-NeoX checkpoint."
    )
    parser.add_argument("--model", type=Path, required=True, help="the Hugging Face folder")
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
        "--tokenizer",
        type=Path,
        help="tokenizer.json or a tokenizer's folder, in place of the model's own",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint folder that is there"
    )
    options = parser.parse_args()
    written = hf_to_neox(
        options.model,
        options.output,
        options.tensor_parallel,
        options.pipeline_parallel,
        options.tokenizer,
        options.overwrite,
    )
    shape = written.shape
    rows = HFFolder(options.model).shape.padded_vocab_size
    print(
        f"wrote {written.step}: tensor parallel {options.tensor_parallel}, pipeline parallel "
        f"{options.pipeline_parallel}, {shape.padded_vocab_size:,} vocabulary rows, "
        f"{shape.padded_vocab_size - rows} of them padding\n"
        f"train from it: python ./deepy.py train.py -d {options.output.resolve() / 'configs'} "
        f"{MODEL_FILE} {TRAINING_FILE} YOURS.yml, which names data_path and save"
    )


if __name__ == "__main__":
    run(main)
