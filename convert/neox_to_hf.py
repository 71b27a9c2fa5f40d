#!/usr/bin/env python3
"""Exports a GPT-NeoX checkpoint of a MetaLA model, of any parallel layout, to Hugging Face.

python convert/neox_to_hf.py --checkpoint CHECKPOINTS --output FOLDER --verify
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from convert.command import ConvertError, command_parser, need_neox
from convert.export_record import check_model_export, write_record
from convert.hf_io import size_argument, write_config, write_weights
from convert.hub import check_push, push_to_hub, write_model_card
from convert.neox_reader import NeoXCheckpoint
from convert.neox_writer import padded_vocabulary
from convert.output_folder import check_target, complete_folder
from convert.tensor_table import TensorRule, tensor_table
from convert.tokenizer import RunTokenizer, find_tokenizer, read_tokenizer
from convert.verify import Comparison, verify
from megatron_patch.architecture import Architecture
from megatron_patch.architecture_neox import with_defaults
from megatron_patch.commands.command_line import one_of, run_script

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# `--fold-norms`: the norm whose scale multiplies the input channels of a tensor, and the dimension
# of those channels. In a mixer the depthwise convolution, which has no bias, comes first.
FOLDED_INTO = {
    "mixer.conv1d.weight": ("input_norm.scale", 0),
    "mlp.gate_up_proj.weight": ("mlp_norm.scale", 1),
    "attention.query_key_value.weight": ("input_layernorm.scale", 1),
    "mlp.linear1.weight": ("post_attention_layernorm.scale", 1),
    "final_linear.weight": ("norm.scale", 1),
}


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
    """Converts a checkpoint. If anything fails, `output` is as it was before.

    Args:
        checkpoint: the folder that GPT-NeoX's `save` named.
        output: the folder to write.
        iteration: the iteration to read, by default the latest.
        config: YAML files of the run, in place of those inside the checkpoint.
        tokenizer: tokenizer.json or a tokenizer's folder, in place of the settings' `vocab_file`.
        dtype: the dtype to write, by default each tensor's dtype in training (to which the float32
            weights of ZeRO stage 3 are rounded).
        check: whether to compare the result with the GPT-NeoX model, and to return the comparison.
        keep_vocab_padding: whether to keep the vocabulary's padding rows.
        overwrite: whether to replace a Hugging Face folder that is there.
        max_shard_bytes: largest size of a safetensors file.
        fold_norms: whether to fold the scales of norms into the weights that follow.

    Raises:
        ConvertError: something is missing, damaged, ambiguous or not equal; the line says what.
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
    numbers: Counter[torch.dtype] = Counter()
    for rule, to in dtypes.items():
        numbers[to] += math.prod(rule.shape)
    main_dtype = numbers.most_common(1)[0][0]
    is_rounded = any(
        torch.promote_types(source.dtype(rule), to) != to for rule, to in dtypes.items()
    )
    rounded_to = dtype if is_rounded else None
    if folded and rounded_to is None:
        # Products of weights and scales are computed in float32 and rounded to the dtype written.
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
        write_model_card(folder, shape, source, main_dtype, comparison)
        write_record(folder, checksums)

    parameters = sum(numbers.values())
    special = ", ".join(f"{key[:3]} {token}" for key, token in words.special.items())
    print(
        f"read     {source.step}: {source.form} checkpoint, tensor parallel "
        f"{source.tensor_parallel}\n"
        f"wrote    {output}: {parameters:,} parameters, {str(main_dtype)[6:]}, "
        f"{size / 1e6:,.1f} MB\n"
        f"tokens   {words.source}: {words.size:,}, written {vocab_size:,}; {special}\n"
        f"verified {comparison or 'no; --verify compares with the GPT-NeoX model'}"
    )
    return comparison


def vocabulary_to_write(source: NeoXCheckpoint, tokenizer: RunTokenizer, keep_padding: bool) -> int:
    """Returns the rows of the vocabulary to export: the tokenizer's tokens, or all. Raises a
    ConvertError if the tokenizer does not fit the checkpoint."""
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


class FoldedNorms:
    """A checkpoint with weighted RMS norms as the same model with the authors' parameter-free ones.

    Each norm's scale is folded, channel by channel, into the weights that follow the norm. Raises a
    ConvertError if the norm has a mean to subtract, or the head is tied to the embedding, so that
    no weights follow the last norm alone.
    """

    def __init__(self, source: NeoXCheckpoint):
        if source.shape.norm == "layernorm":
            raise ConvertError(
                "--fold-norms: norm: found 'layernorm', whose mean no weights can take away, "
                "wanted rmsnorm"
            )
        if source.shape.norm == "rmsnorm" and source.shape.tied:
            raise ConvertError(
                "--fold-norms: no_weight_tying is false: the last norm's scale cannot go into the "
                "embedding, which the head shares"
            )
        self._source = source
        scales = {scale for scale, _ in FOLDED_INTO.values()}
        # Keyed by the layer of the tensor to fold into; the head is one layer after the last norm.
        self._scales = {
            (rule.layer + (rule.name == "norm.scale"), rule.name): rule
            for rule in source.table
            if rule.name in scales
        }
        folded = {self._scale_rule(rule) for rule in source.table}
        for rule in source.table:
            if rule.name.endswith(".scale") and rule not in folded:
                raise ConvertError(f"--fold-norms: layer {rule.layer}: no place for {rule.name}")
        self.shape: Architecture = replace(source.shape, norm="simplermsnorm")

    def is_folded(self, rule: TensorRule) -> bool:
        """Returns whether a scale is folded into the tensor."""
        return self._scale_rule(rule) is not None

    def full(self, rule: TensorRule, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a tensor as `NeoXCheckpoint.full` does; in float32, for a single rounding, if a
        scale is folded into it."""
        tensor = self._source.full(rule, out)
        scale_rule = self._scale_rule(rule)
        if scale_rule is None:
            return tensor
        scale = self._source.full(scale_rule).float()
        shape = [1] * tensor.ndim
        shape[FOLDED_INTO[rule.name][1]] = -1
        return tensor.float() * scale.view(shape)

    def _scale_rule(self, rule: TensorRule) -> TensorRule | None:
        scale, _ = FOLDED_INTO.get(rule.name, (None, None))
        return self._scales.get((rule.layer, scale))


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__, "Hugging Face", reads_checkpoint=True)
    add = parser.add_argument
    add("--dtype", type=one_of(DTYPES), help=f"{', '.join(DTYPES)}; default: that of the training")
    verify_help = "run the GPT-NeoX model and the result on the same tokens; fail if they differ"
    add("--verify", dest="check", action="store_true", help=verify_help)
    padding = "keep the rows that GPT-NeoX added to the vocabulary; default: trim to the tokenizer"
    add("--keep-vocab-padding", action="store_true", help=padding)
    fold = "fold the weights of `norm: rmsnorm` into those that follow: the authors' format"
    add("--fold-norms", action="store_true", help=fold)
    size = {"dest": "max_shard_bytes", "default": "5GB", "metavar": "SIZE", "type": size_argument}
    add("--max-shard-size", **size, help="of one file, default: 5GB")
    push = "upload the folder to this repository of the Hugging Face Hub, made if there is none"
    add("--push-to-hub", metavar="REPO", help=push)
    add("--private", action="store_true", help="with --push-to-hub: make a private repository")
    options = vars(parser.parse_args(argv))
    repository, private = options.pop("push_to_hub"), options.pop("private")
    options["dtype"] = DTYPES.get(options["dtype"])
    if repository is not None:
        check_push(repository)
    elif private:
        parser.error("--private: without --push-to-hub")
    neox_to_hf(**options)
    if repository is not None:
        address = push_to_hub(options["output"], repository, private)
        print(f"uploaded to {address}")


cli = partial(run_script, main)


if __name__ == "__main__":
    cli()
