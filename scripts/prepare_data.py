#!/usr/bin/env python3
"""Turns text into the files that GPT-NeoX trains on: PREFIX.bin and PREFIX.idx, for `data_path`.

A text file is one document, a line of a .jsonl file too; folders are searched for files in the
order of their names. Each document ends with <|endoftext|>. The same input gives the same files."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from command_line import Parser, existing, existing_file, output_path, run_script, told, whole
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_patch.indexed_dataset import (
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    index_map_paths,
)

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")


def list_files(inputs: Iterable[Path], suffixes: Iterable[str] | None = None) -> list[Path]:
    """Files to read, in a reproducible order: inputs as given, inside folders by name.

    Args:
        inputs: files, taken whatever their name, and folders.
        suffixes: endings of the files to take from folders; by default those of `TEXT_SUFFIXES`.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: nothing was found.
    """
    wanted = tuple(suffixes or TEXT_SUFFIXES)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.is_file() and p.name.endswith(wanted))
            files.extend(sorted(found, key=lambda p: p.relative_to(path).as_posix()))
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not files:
        raise ValueError(f"no files ending in {', '.join(wanted)} found (see --suffix)")
    return files


def iterate_documents(
    inputs: Iterable[Path], json_key: str = "text", suffixes: Iterable[str] | None = None
) -> Iterator[str]:
    """The texts of all documents; empty ones are left out.

    Raises:
        ValueError: a line of a .jsonl file is not an object with a text under `json_key`, or a file
            is not UTF-8; names the file (and line).
    """
    for path in list_files(inputs, suffixes):
        yield from (text for text in _documents_of(path, json_key) if text.strip())


def _documents_of(path: Path, json_key: str) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            yield from _texts_of_lines(path, json_key)
        else:
            yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None


def _texts_of_lines(path: Path, json_key: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[json_key]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}:{number}: wanted an object with a text under {json_key!r}"
                )
            yield text


def with_a_first(texts: Iterable[str]) -> Iterator[str]:
    """The same texts, of which the first has been read.

    Raises:
        ValueError: there is none.
    """
    texts = iter(texts)
    for first in texts:
        return chain([first], texts)
    raise ValueError("inputs: found no text, wanted one document or more")


def refuse_existing(outputs: Iterable[Path], overwrite: bool) -> None:
    """Raises FileExistsError if one of `outputs` is there and may not be replaced."""
    for path in outputs:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} is already there; --overwrite replaces it")


class Encoder:
    """Text to tokens, in this process or as the function of a pool's workers."""

    def __init__(self, tokenizer_file: Path):
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library has no kind of its own
            raise ValueError(
                f"--tokenizer: found {tokenizer_file} ({told(error)}), wanted a tokenizer.json"
            ) from None
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)
        if self.end_of_text is None:
            raise ValueError(
                f"{tokenizer_file}: has no {END_OF_TEXT} token, by which GPT-NeoX ends a document"
            )

    def __call__(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*tokens, self.end_of_text]


_worker: Encoder | None = None


def _start_worker(tokenizer_file: Path) -> None:
    global _worker
    _worker = Encoder(tokenizer_file)


def _encode_in_worker(text: str) -> list[int]:
    return _worker(text)


def prepare(
    texts: Iterable[str], tokenizer_file: Path, prefix: Path, workers: int = 1
) -> tuple[int, int]:
    """Writes the data set and returns its numbers of documents and tokens.

    Raises:
        ValueError: there is no text, or the tokenizer is none; nothing is written then.
    """
    encoder = Encoder(tokenizer_file)
    texts = with_a_first(texts)
    documents = tokens = 0
    bar = tqdm(desc=f"Writing {prefix}", unit=" tokens", unit_scale=True, mininterval=0.5)
    with bar, IndexedDatasetWriter(prefix, encoder.tokenizer.get_vocab_size()) as writer:
        for document in _encode_all(texts, encoder, tokenizer_file, workers):
            writer.add_document(document)
            documents += 1
            tokens += len(document)
            bar.update(len(document))
    return documents, tokens


def _encode_all(
    texts: Iterable[str], encoder: Encoder, tokenizer_file: Path, workers: int
) -> Iterator[list[int]]:
    if workers == 1:
        yield from map(encoder, texts)
        return
    # `imap` reads ahead without limit; a corpus may be larger than the memory.
    ahead = threading.Semaphore(64 * workers)
    done = threading.Event()

    def throttled() -> Iterator[str]:
        for text in texts:
            ahead.acquire()
            if done.is_set():
                return
            yield text

    # "spawn": the tokenizers library has threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (tokenizer_file,)) as pool:
        try:
            for tokens in pool.imap(_encode_in_worker, throttled(), chunksize=16):
                ahead.release()
                yield tokens
        finally:
            done.set()
            ahead.release()


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "inputs", type=existing, nargs="+", help="text files, .jsonl files, folders"
    )
    parser.add_argument(
        "--output", type=output_path, required=True, help="PREFIX of the files to write"
    )
    parser.add_argument("--tokenizer", type=existing_file, required=True, help="a tokenizer.json")
    parser.add_argument("--json-key", default="text", help="key of the text in .jsonl files")
    parser.add_argument("--suffix", action="append", help="in folders: only such files, e.g. .py")
    parser.add_argument("--workers", type=whole(1), default=1, help="processes that tokenize")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    args = parser.parse_args()
    try:
        refuse_existing([bin_path(args.output), idx_path(args.output)], args.overwrite)
        texts = iterate_documents(args.inputs, args.json_key, args.suffix)
        documents, tokens = prepare(texts, args.tokenizer, args.output, args.workers)
        for path in index_map_paths(args.output):  # of what was there before
            path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_data.py: {told(error)}")
    print(f"{args.output}.bin, .idx: {documents:,} documents, {tokens:,} tokens")


if __name__ == "__main__":
    run_script(main)
