#!/usr/bin/env python3
"""A GPT-NeoX checkpoint of a MetaLA model, in any parallel layout, as a Hugging Face folder:

python convert/neox_to_hf.py --checkpoint CHECKPOINTS --output FOLDER --verify
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from convert.command import ConvertError, run
from convert.export_record import check_model_export, write_record
from convert.fold_norms import FoldedNorms
from convert.folder import check_target, complete_folder
from convert.gpt_neox import need_neox
from convert.hf_folder import parse_size, write_config, write_weights
from convert.model_card import write_model_card
from convert.neox_checkpoint import NeoXCheckpoint
from convert.push_to_hub import check_push, push_to_hub
from convert.tensor_table import tensor_table
from convert.tokenizer_folder import RunTokenizer, find_tokenizer, read_tokenizer
from convert.verify import Comparison, verify
from convert.vocabulary import padded_vocabulary
from megatron_patch.architecture import Architecture
from megatron_patch.architecture_neox import with_defaults

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def neox_to_hf(
    checkpoint: Path,
    output: Path,
    iteration: int | None = None,
    config: list[Path] | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    check: bool = False,
    keep_vocab_padding: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    fold_norms: bool = False,
) -> Comparison | None:
    """Converts a checkpoint; `output` is then complete, or as it was before if anything fails.

    Args:
        checkpoint: the folder that GPT-NeoX's `save` named.
        output: the folder to write.
        iteration: which one to read, by default the latest.
        config: YAML files of the run, in place of those inside the checkpoint.
        tokenizer: tokenizer.json or a tokenizer's folder, in place of the settings' `vocab_file`.
        dtype: of the tensors written, by default the one that each had in training (float32 under
            ZeRO stage 3 is rounded to it).
        check: whether to compare the result with the GPT-NeoX model.
        keep_vocab_padding: whether to keep the vocabulary's padding rows.
        overwrite: whether to replace a Hugging Face folder that is there.
        max_shard_bytes: size of one safetensors file.
        fold_norms: whether to fold the scales of norms into the weights that follow.

    Returns:
        what `check` found.

    Raises:
        ConvertError: something is missing, damaged, ambiguous or not equal; see the line.
        SettingsError: the settings are malformed.
    """
    check_target(output, overwrite, check_model_export)
    neox = need_neox() if check else None
    source = NeoXCheckpoint(checkpoint, iteration, config)
    args = with_defaults(source.settings)
    words = read_tokenizer(find_tokenizer(tokenizer, args))
    vocab_size = vocabulary_to_write(source, words, keep_vocab_padding)
    folded = FoldedNorms(source) if fold_norms else None
    shape = replace((folded or source).shape, padded_vocab_size=vocab_size)
    table = tensor_table(shape)
    dtypes = {rule: dtype or source.dtype(rule) for rule in table}
    main_dtype = dtype or _commonest(dtypes)
    is_rounded = any(
        torch.promote_types(source.dtype(rule), to) != to for rule, to in dtypes.items()
    )
    rounded_to = dtype if is_rounded else None
    if folded and rounded_to is None:
        # Products with the scales are rounded to the dtype that they are written in.
        products = {to for rule, to in dtypes.items() if folded.is_folded(rule)}
        rounded_to = next((to for to in products if to.itemsize < 4), None)

    with complete_folder(output, overwrite, check_model_export) as folder:
        words.write(folder)
        write_config(folder, shape, words.special, main_dtype)
        largest = max(math.prod(rule.shape) * source.dtype(rule).itemsize for rule in source.table)
        memory = torch.empty(largest, dtype=torch.uint8)
        full = partial((folded or source).full, out=memory)
        size, checksums = write_weights(folder, table, full, dtypes, max_shard_bytes)
        comparison = verify(neox, source, folder, words.size, rounded_to) if neox else None
        write_model_card(
            folder,
            shape,
            source.settings,
            main_dtype,
            source.iteration,
            source.samples,
            comparison,
        )
        write_record(folder, checksums)

    print_summary(source, output, words, shape, main_dtype, size, comparison)
    return comparison


def vocabulary_to_write(source: NeoXCheckpoint, tokenizer: RunTokenizer, keep_padding: bool) -> int:
    """Rows of the vocabulary to export: the tokenizer's tokens, or all.

    Raises:
        ConvertError: the tokenizer is not that of the training.
    """
    rows = source.shape.padded_vocab_size
    args = with_defaults(source.settings)
    padded = padded_vocabulary(
        tokenizer.size, args.make_vocab_size_divisible_by, source.tensor_parallel
    )
    if tokenizer.size > rows or (padded != rows and not keep_padding):
        raise ConvertError(
            f"{tokenizer.source} has {tokenizer.size} tokens, padded {padded}, but the checkpoint "
            f"has {rows} rows: not the tokenizer of this training? Give the right one by "
            "--tokenizer" + ("" if tokenizer.size > rows else ", or --keep-vocab-padding")
        )
    return rows if keep_padding else tokenizer.size


def _commonest(dtypes: dict) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for rule, dtype in dtypes.items():
        counts[dtype] += math.prod(rule.shape)
    return counts.most_common(1)[0][0]


def print_summary(
    source: NeoXCheckpoint,
    output: Path,
    tokenizer: RunTokenizer,
    shape: Architecture,
    dtype: torch.dtype,
    size: int,
    comparison: Comparison | None,
) -> None:
    """Says what was read, written and found."""
    special = tokenizer.special
    parameters = sum(math.prod(rule.shape) for rule in tensor_table(shape))
    print(f"read     {source.step}: {source.form} form, tensor parallel {source.tensor_parallel}")
    print(f"wrote    {output}: {parameters:,} parameters, {str(dtype)[6:]}, {size / 1e6:,.1f} MB")
    print(
        f"tokens   {tokenizer.source}: {tokenizer.size:,}, written {shape.padded_vocab_size:,}; "
        f"bos {special.bos}, eos {special.eos}, pad {special.pad}"
    )
    if comparison:
        print(f"verified {comparison}")
    else:
        print("verified no; --verify compares with the GPT-NeoX model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a GPT-NeoX checkpoint of a MetaLA model to a Hugging Face folder."
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the folder that GPT-NeoX's `save` named"
    )
    parser.add_argument("--iteration", type=int, help="default: the latest")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
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
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the training")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the GPT-NeoX model and the result on the same tokens; fail if they differ",
    )
    parser.add_argument(
        "--keep-vocab-padding",
        action="store_true",
        help="keep the rows that GPT-NeoX added to the vocabulary; default: trim to the tokenizer",
    )
    parser.add_argument(
        "--fold-norms",
        action="store_true",
        help="fold the weights of `norm: rmsnorm` into those that follow: the authors' format",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file, default: 5GB"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a Hugging Face folder that is there"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="upload the folder to this repository of the Hugging Face Hub, made if there is none",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to-hub: make a private repository"
    )
    options = parser.parse_args()
    try:
        max_shard_bytes = parse_size(options.max_shard_size)
    except ValueError as error:
        parser.error(f"--max-shard-size: {error}")
    is_pushed = options.push_to_hub is not None
    if options.private and not is_pushed:
        parser.error("--private: without --push-to-hub")
    if is_pushed:
        check_push(options.push_to_hub)
    neox_to_hf(
        options.checkpoint,
        options.output,
        options.iteration,
        options.config,
        options.tokenizer,
        DTYPES.get(options.dtype),
        options.verify,
        options.keep_vocab_padding,
        options.overwrite,
        max_shard_bytes,
        options.fold_norms,
    )
    if is_pushed:
        address = push_to_hub(options.output, options.push_to_hub, options.private)
        print(f"uploaded to {address}")


if __name__ == "__main__":
    run(main)
