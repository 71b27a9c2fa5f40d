"""A tokenizer of the size that the synthetic models are written for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.synthetic import TOKENS


def write_tokenizer(path: Path, special: tuple[str, ...], tokens: int = TOKENS) -> Path:
    """A word-level tokenizer.json with exactly `tokens` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(tokens - len(special))]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory) -> Path:
    """A tokenizer.json with end-of-document and padding tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    return write_tokenizer(folder / "tokenizer.json", ("<|endoftext|>", "<|padding|>"))
