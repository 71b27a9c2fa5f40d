#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer on text files and writes a tokenizer.json for GPT-NeoX's
`HFTokenizer` and for Hugging Face: every text can be encoded, <|endoftext|> ends a document."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_patch.commands.command_line import (
    CommandError,
    output_path,
    replacing,
    run_script,
    told,
    whole,
)
from megatron_patch.commands.documents import iterate_documents, with_a_first
from megatron_patch.commands.prepare_data import END_OF_TEXT, refuse_existing, text_parser
from megatron_patch.commands.text_pieces import BEFORE_WHITESPACE, pieces

# GPT-NeoX looks this token up by name, as it does END_OF_TEXT.
PADDING = "<|padding|>"
SMALLEST = 256 + 2  # every byte, and the two special tokens


def train(texts: Iterable[str], vocab_size: int, progress: bool = True) -> Tokenizer:
    """Returns a tokenizer with at most `vocab_size` tokens; the same texts give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = text_parser(__doc__)
    parser.add_argument("--output", type=output_path, required=True, help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=whole(SMALLEST), default=32000)
    args = parser.parse_args()
    try:
        refuse_existing([args.output], args.overwrite)
        documents = iterate_documents(args.inputs, args.json_key, args.suffix, args.max_document)
        # Short pieces save memory, and have the same words as the whole text.
        texts = (
            piece
            for document in with_a_first(documents)
            for piece, _ in pieces(document, BEFORE_WHITESPACE, longest=args.max_document)
        )
        tokenizer = train(texts, args.vocab_size)
        with replacing(args.output) as temporary:
            temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    except ValueError as error:
        raise CommandError(told(error)) from None
    print(f"{args.output}: {tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    run_script(main)
