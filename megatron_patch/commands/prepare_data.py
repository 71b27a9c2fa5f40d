"""Turns text into the files that GPT-NeoX trains on: PREFIX.bin and PREFIX.idx, for `data_path`.

A text file is one document, a line of a .jsonl or .ndjson file too; folders are searched for files
in the order of their names. Each document ends with <|endoftext|>; special tokens that stand in a
text are text. The same input gives the same files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_patch.commands.command_line import (
    CommandError,
    Parser,
    existing,
    existing_file,
    output_prefix,
    run_script,
    told,
    whole,
)
from megatron_patch.commands.documents import MAX_BYTES, Document, iterate_documents, with_a_first
from megatron_patch.commands.text_pieces import MAX_STRETCH, PIECE, pieces, safe_cut
from megatron_patch.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path, index_map_paths

END_OF_TEXT = "<|endoftext|>"
# What is encoded at once, with a thread for each core.
MOST_TEXTS, MOST_CHARACTERS = 1024, PIECE * min(os.cpu_count() or 1, 8)


def refuse_existing(outputs: Iterable[Path], overwrite: bool) -> None:
    """Raises FileExistsError if one of `outputs` exists and may not be replaced."""
    for path in outputs:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} is already there; --overwrite replaces it")


def text_parser(description: str) -> Parser:
    """Returns a parser with the arguments of `iterate_documents`, and --overwrite."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("inputs", type=existing, nargs="+", help="text files, .jsonl files, folders")
    add("--json-key", default="text", help="key of the text in .jsonl files")
    add("--suffix", action="append", help="in folders: only such files, e.g. .py")
    most = "bytes of the largest document"
    add("--max-document", type=whole(1), default=MAX_BYTES, help=most)
    add("--overwrite", action="store_true", help="replace existing output")
    return parser


class Encoder:
    """Turns text into tokens. With `special_tokens`, special tokens in a text stay special; else
    they are text. Raises a ValueError if the file is no tokenizer.json, or has no `END_OF_TEXT`."""

    def __init__(self, tokenizer_file: Path, special_tokens: bool = False):
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(
                f"--tokenizer: found {tokenizer_file} ({told(error)}), wanted a tokenizer.json"
            ) from None
        self.file = tokenizer_file
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)
        if self.end_of_text is None:
            raise ValueError(
                f"{tokenizer_file}: has no {END_OF_TEXT} token, by which GPT-NeoX ends a document"
            )
        self.special_tokens = special_tokens
        if not special_tokens:
            self.tokenizer.add_special_tokens([END_OF_TEXT])  # it may be one that is not special
            self.tokenizer.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder().values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        # transformers may have saved truncation and padding in the file.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, texts: list[str]) -> tuple[list[np.ndarray], Counter[str]]:
        """Returns the tokens of each text, int32, and how often each special token occurs. Raises a
        ValueError if the tokenizer turns other text into the token that ends documents."""
        found = Counter(token for text in texts for token in self.special.findall(text))
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        encoded = [np.array(encoding.ids, np.int32) for encoding in encodings]
        if not self.special_tokens and any((ids == self.end_of_text).any() for ids in encoded):
            raise ValueError(
                f"{self.file}: makes {END_OF_TEXT}, which ends a document, of other text "
                "(--special-tokens lets it)"
            )
        return encoded, found


class Prepared(NamedTuple):
    """The numbers of documents and tokens written, and of special tokens found in the text."""

    documents: int
    tokens: int
    special: Counter[str]


def prepare(
    documents: Iterable[Document],
    encoder: Encoder,
    prefix: Path,
    max_stretch: int = MAX_STRETCH,
    overwrite: bool = True,
) -> Prepared:
    """Writes PREFIX.bin and PREFIX.idx. Raises a ValueError if there is no text, or one is too long
    for its tokenizer, or another process writes this data set. Nothing is left behind then."""
    documents = with_a_first(documents)
    cut = safe_cut(encoder.tokenizer, encoder.special_tokens)
    count = tokens = 0
    special: Counter[str] = Counter()
    bar = tqdm(desc=f"Writing {prefix}", unit=" tokens", unit_scale=True, mininterval=0.5)
    vocabulary = encoder.tokenizer.get_vocab_size()
    with bar, IndexedDatasetWriter(prefix, vocabulary) as writer:
        # Once more, now that the writer holds its lock: another run may just have written them.
        refuse_existing(writer.paths, overwrite)
        parts = (
            part for document in documents for part in pieces(document, cut, longest=max_stretch)
        )
        tokens_of_document: list[np.ndarray] = []
        for batch in _batches(parts):
            encoded, found = encoder([text for text, _ in batch])
            special.update(found)
            for ids, (_, is_last) in zip(encoded, batch, strict=True):
                tokens_of_document.append(ids)
                if is_last:
                    tokens_of_document.append(np.array([encoder.end_of_text], np.int32))
                    document = np.concatenate(tokens_of_document)
                    tokens_of_document.clear()
                    writer.add_document(document)
                    count += 1
                    tokens += len(document)
                    bar.update(len(document))
    return Prepared(count, tokens, special)


def _batches(parts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups (text, whether it ends its document) into what is encoded at once."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= MOST_CHARACTERS or len(batch) >= MOST_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def report_special_tokens(special: Counter[str], as_tokens: bool) -> None:
    """Prints which special tokens the text contains, and how they were read."""
    if special:
        which = ", ".join(f"{content} {count:,}" for content, count in special.most_common(5))
        more = f" and {len(special) - 5} others" if len(special) > 5 else ""
        how = "read as such" if as_tokens else "read as text, --special-tokens reads them as such"
        print(f"special tokens in the text: {which}{more}; {how}")


def main(argv: list[str] | None = None) -> None:
    parser = text_parser(__doc__)
    add = parser.add_argument
    add("--output", type=output_prefix, required=True, help="PREFIX of the files to write")
    add("--tokenizer", type=existing_file, required=True, help="a tokenizer.json")
    add(
        "--special-tokens",
        action="store_true",
        help=f"read special tokens in the text, such as {END_OF_TEXT}, as such, not as text",
    )
    add(
        "--max-stretch",
        type=whole(1),
        default=MAX_STRETCH,
        help="most characters to tokenize at once, where the tokenizer allows no cut; each takes "
        "about 300 bytes of memory",
    )
    args = parser.parse_args(argv)
    try:
        refuse_existing([bin_path(args.output), idx_path(args.output)], args.overwrite)
        encoder = Encoder(args.tokenizer, args.special_tokens)
        documents = iterate_documents(args.inputs, args.json_key, args.suffix, args.max_document)
        prepared = prepare(documents, encoder, args.output, args.max_stretch, args.overwrite)
        for path in index_map_paths(args.output):  # they index the data that was replaced
            path.unlink(missing_ok=True)
    except ValueError as error:
        raise CommandError(told(error)) from None
    report_special_tokens(prepared.special, args.special_tokens)
    print(f"{args.output}.bin, .idx: {prepared.documents:,} documents, {prepared.tokens:,} tokens")


cli = partial(run_script, main)
